"""What a training imports: packages that others would import, and it does not use, cost every rank a second."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from sousbatch.jobs.train import _hidden, _unused_packages
from sousbatch.recipes.schema import Adapter, StageSettings, Train


def test_a_hidden_package_looks_as_if_it_were_not_installed_and_is_there_again() -> None:
    sys.modules.pop("this", None)
    with _hidden("this", "json"):
        assert importlib.util.find_spec("this") is None
        assert importlib.import_module("json").loads("1") == 1, "what is loaded already stays"
        with pytest.raises(ImportError):
            importlib.import_module("this")
    assert importlib.util.find_spec("this") is not None


@pytest.mark.parametrize(
    ("settings", "is_hidden"),
    [
        (StageSettings(), True),
        (StageSettings(adapter=Adapter(method="lora")), True),
        (StageSettings(adapter=Adapter(method="qlora")), False),
        (StageSettings(train=Train(optimizer="paged_adamw_8bit")), False),
    ],
)
def test_bitsandbytes_is_hidden_unless_weights_or_optimizer_use_it(settings: StageSettings, is_hidden: bool) -> None:
    assert ("bitsandbytes" in _unused_packages(settings)) == is_hidden
