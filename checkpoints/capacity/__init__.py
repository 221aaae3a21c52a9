"""How many bytes there are: free space, quotas, what other runs reserved, and space allocated ahead."""
