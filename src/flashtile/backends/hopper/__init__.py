"""Gluon kernels for NVIDIA Hopper (compute capability 9.0): warp-specialised, with TMA and asynchronous products."""
