"""What the kernels are made of: channels between warps, masks, scores, the online softmax, scheduling."""
