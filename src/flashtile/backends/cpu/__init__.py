"""Attention on the CPU: tiled online softmax in plain torch, and torch's fused op where it serves the whole problem."""
