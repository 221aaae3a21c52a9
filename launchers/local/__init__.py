"""The launcher of this machine: its jobs are processes that share cores, memory and devices."""
