"""Read the model, the data, the code and the disk for planning.

These are the only effects before compiling.
"""
