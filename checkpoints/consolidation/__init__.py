"""How a half-precision model is written from a checkpoint's tensors.

It is written in blocks, under a byte limit.
"""
