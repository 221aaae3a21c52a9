"""The errors of vLLM's engine."""


class EngineDeadError(Exception):
    """One of vLLM's processes has ended."""
