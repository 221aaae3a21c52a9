"""What planning reads of the model, the data, the code and the disk.

These are the only effects before compiling.
"""
