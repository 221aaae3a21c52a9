"""W&B's names are known in one module only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sousbatch.tracking.wandb import _variables

from .conftest import make_identity

ROOT = Path(__file__).parents[2]
# Where else the name may stand, and why.
ALLOWED = {
    **{str(path.relative_to(ROOT)): "what is W&B's own" for path in ROOT.glob("tracking/wandb*.py")},
    "tracking/base.py": "the table",
    "recipes/schema/execution.py": "help of the keys",
    "recipes/schema/rules.py": "a W&B key written into the recipe is refused",
    "recipes/inspect/cache.py": "a folder that is no code of the user",
    "redaction.py": "what a key looks like",
    "cli/doctor.py": "what is installed, and whether there is a key",
}


def test_no_other_module_knows_wandb() -> None:
    sources = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")]
    named = {
        str(path.relative_to(ROOT))
        for path in sources
        if not path.relative_to(ROOT).parts[0].startswith((".", "build"))
        and re.search(r"wandb|w&b", path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert named == ALLOWED.keys()


@pytest.mark.parametrize("task, wanted", [(None, "0123456789ab-train"), (3, "0123456789ab-train-3")], ids=str)
def test_the_variables_are_those_of_the_identity(task: int | None, wanted: str, tmp_path: Path) -> None:
    identity = make_identity(per="task", tags=("a", "b"), entity="our-team").of_task(
        "train", "train", task, tmp_path, 1
    )
    found = _variables(identity)
    named = ("RUN_ID", "RUN_GROUP", "NAME", "JOB_TYPE", "PROJECT", "ENTITY", "TAGS", "MODE", "RESUME", "DIR")
    assert [found[f"WANDB_{name}"] for name in named] == [
        *(
            wanted,
            "toy-0123456789ab",
            "toy 012345 train",
            "train",
            "our-project",
            "our-team",
            "a,b",
            "offline",
            "allow",
        ),
        str(tmp_path),
    ]


def test_without_tags_and_entity_those_of_the_shell_stay(tmp_path: Path) -> None:
    found = _variables(make_identity().of_task("train", "train", None, tmp_path, 1))
    assert not found.keys() & {"WANDB_TAGS", "WANDB_ENTITY"}
