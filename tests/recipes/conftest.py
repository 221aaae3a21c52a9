"""The plan made by hand, as a module: `small.RECIPE`, `small.plan()`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """The module small_plan.py beside this file."""
    spec = importlib.util.spec_from_file_location("small_plan", Path(__file__).with_name("small_plan.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
