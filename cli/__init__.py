"""The command line.

There is one module for each noun, with its parser, its handler and its text.
"""
