"""Turn a fine-tuning recipe into jobs, a model and complete predictions.

The model has half precision. The functions for Python code are those of `api`; each is imported when it is first used,
so that `import sousbatch` costs nothing. docs/python.md shows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import (
        Run,
        SousbatchError,
        compile,
        compose,
        consolidate,
        inspect,
        merge_predictions,
        open_run,
        score,
        submit,
    )

__version__ = "0.1.0"
__all__ = [
    "Run",
    "SousbatchError",
    "compile",
    "compose",
    "consolidate",
    "inspect",
    "merge_predictions",
    "open_run",
    "score",
    "submit",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(".api", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
