"""What a plan will take: parameters that train, memory of the device, bytes on the disk."""
