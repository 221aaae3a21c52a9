"""Write a half-precision model from a checkpoint's tensors.

It is written in blocks, under a byte limit.
"""
