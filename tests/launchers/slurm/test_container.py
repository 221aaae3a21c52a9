"""How a rank gets into its container: srun's options for pyxis, a command before it for apptainer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from sousbatch.cluster import slurm
from sousbatch.launchers.slurm.script import container_words
from sousbatch.recipes.plan import Stage, StageModel, StageSplit
from sousbatch.recipes.schema import Environment, Resources
from sousbatch.run_folder import RunPaths

PATHS = RunPaths(root=Path("/runs/r/3f2a"))
SPLITS = {
    use: StageSplit(name=use, path=f"/data/{use}.jsonl", digest=use, num_rows=1, num_examples=1)
    for use in ("train", "eval")
}
MODEL = StageModel(folder="/", tokenizer_folder="/")
STAGE = Stage(
    name="train", kind="train", of=None, resources=Resources(), num_tasks=1, after=(), model=MODEL, splits=SPLITS
)


def test_without_a_container_nothing_is_added() -> None:
    assert container_words(Environment(), STAGE, PATHS) == ([], [])


def test_pyxis_is_told_by_sruns_options() -> None:
    environment = Environment(container="lab#train:2", mounts=("/scratch:/scratch",))
    options, before = container_words(environment, STAGE, PATHS)
    assert options == [
        "--container-image=lab#train:2",
        "--container-mounts=/:/,/data:/data,/runs/r/3f2a:/runs/r/3f2a,/scratch:/scratch",
    ]
    assert before == []
    command = slurm.srun(["python"], nodes=2, tasks_per_node=4, cpus_per_task=8, options=options)
    assert command[-3:] == [*options, "python"]


# It shows what it was asked for, then runs the rest as apptainer does: here, without a container.
APPTAINER = """\
#!/usr/bin/env python3
import json, os, sys
words = sys.argv[1:]
assert words.pop(0) == "exec" and words.pop(0) == "--nv"
binds = []
while words[0] == "--bind":
    binds.append(words[1])
    words = words[2:]
print(json.dumps({"binds": binds, "image": words.pop(0)}), flush=True)
os.execvp(words[0], words)
"""


def test_apptainer_runs_the_rank_and_sees_what_it_reads_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apptainer").write_text(APPTAINER)
    (tmp_path / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    image = "/images/it's $(mine).sif"
    environment = Environment(container=image, container_runtime="apptainer", mounts=("/a b:/c",))
    options, before = container_words(environment, STAGE, PATHS)
    assert options == []
    done = subprocess.run([*before, "echo", "a rank"], capture_output=True, text=True, check=True)
    asked, printed = done.stdout.splitlines()
    assert json.loads(asked) == {
        "binds": ["/:/", "/data:/data", "/runs/r/3f2a:/runs/r/3f2a", "/a b:/c"],
        "image": image,
    }
    assert printed == "a rank"
