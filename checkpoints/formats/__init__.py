"""Readers of other programs' checkpoint files.

They find the tensors with their place, and never run a pickle.
"""
