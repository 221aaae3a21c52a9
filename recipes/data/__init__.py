"""Rows of the data.

Here they are read, checked for faults, generated, and turned into token ids.
"""
