"""How a half-precision model is written from a checkpoint's tensors, in blocks, under a byte limit."""
