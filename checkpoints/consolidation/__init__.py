"""Write a half-precision model from a checkpoint's tensors.

The model is written in blocks, under a byte limit.
"""
