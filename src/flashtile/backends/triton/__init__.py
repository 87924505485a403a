"""Portable GPU kernels in Triton: NVIDIA sm_80 and newer, AMD CDNA; every option, forward and backward."""
