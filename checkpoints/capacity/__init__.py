"""Disk space: its limits, and its promises to runs.

Here are free space, quotas, what other runs reserved, and space allocated ahead.
"""
