"""Answering rows: the engine that generates, and the key of everything that decides an answer."""
