"""Launchers are found by name, also those that others install."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.errors import UsageError
from sousbatch.launchers.registry import OWN, launcher_named

Run = Callable[..., tuple[int, str, str]]

# It shows the plan of this machine under a name of its own, and says of each stage when it would start.
TOY = """
from dataclasses import replace
from sousbatch.launchers.local.launcher import LocalLauncher

class ToyLauncher(LocalLauncher):
    name = "toy"
    is_host_bound = False

    def read_site(self):
        return replace(super().read_site(), name="the toy", launcher="toy")

    def objections(self, requests, plan, runs):
        return [], [f"{request.stage} at noon" for request in requests]
"""


def test_every_launcher_of_ours_keeps_its_name() -> None:
    assert {name: launcher_named(name).name for name in OWN} == {name: name for name in OWN}


def test_an_installed_launcher_is_chosen_by_its_name(
    third_party: Callable[[str, str, str], None], sousbatch: Run, project: Path
) -> None:
    third_party("sousbatch.launchers", "toy = toy_module:ToyLauncher", TOY)
    assert not launcher_named("toy", max_age_s=1.0).is_host_bound
    code, out, err = sousbatch("plan", "small.yaml", "--launcher", "toy")
    assert code == 0, err
    assert "the toy" in out and "train at noon" in out


def test_an_unknown_launcher_is_named_with_those_that_are_known(sousbatch: Run, project: Path) -> None:
    with pytest.raises(
        UsageError, match=r"launcher 'slrum' is unknown; known: local, slurm \(did you mean 'slurm'\?\)"
    ):
        launcher_named("slrum")
    code, _, err = sousbatch("plan", "small.yaml", "--launcher", "slrum")
    assert code == 2 and "did you mean 'slurm'" in err
