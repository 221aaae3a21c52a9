"""How many bytes there are.

They are free space, quotas, what other runs reserved, and space allocated ahead.
"""
