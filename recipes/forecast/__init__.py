"""The forecast of a plan's memory and disk.

That is the parameters that train, the memory of the device, and the bytes on the disk.
"""
