"""The versions of what a job imports.

`python -m sousbatch.recipes.inspect.versions` prints its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys

from ...errors import PlanError
from ..generation import ENGINES
from ..schema import Environment

_PACKAGES = (
    *("sousbatch", "torch", "transformers", "accelerate", "deepspeed", "peft", "safetensors", "tokenizers", "numpy"),
    *("bitsandbytes", "flash_attn", "kernels"),
)

_SETUP_S = 60.0  # for the recipe's set-up lines and the start of its Python


def installed() -> dict[str, str]:
    """Return the versions that decide what a job computes.

    They are those of this Python and of packages.
    """
    found = {"python": platform.python_version()}
    engines = [spec.package for spec in map(ENGINES.load, ENGINES) if spec.package]
    for name in (*_PACKAGES, *engines):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def versions_of(environment: Environment) -> dict[str, str]:
    """Return the versions that jobs in *environment* will find.

    Versions inside a container are not known here.

    Raises:
        PlanError: `environment.python` cannot be run, or has no sousbatch.
    """
    if environment.container is not None:
        return {}
    if environment.python is None and not environment.setup:
        return installed()
    python = environment.python or sys.executable
    lines = [*environment.setup, f"exec {shlex.join([python, '-m', 'sousbatch.recipes.inspect.versions'])}"]
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=_SETUP_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PlanError(
            [f"environment.setup takes more than {_SETUP_S:.0f} s here; it runs at planning, too, to find the versions"]
        ) from error
    try:
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (ValueError, IndexError) as error:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        what = f"environment.python {python!r} cannot run jobs"
        way = "install sousbatch there, or name another"
        if environment.setup:
            what, way = f"{what} after environment.setup", f"correct environment.setup, or {way}"
        raise PlanError([f"{what}: {said[0]}; {way}"]) from error


if __name__ == "__main__":
    print(json.dumps(installed()))
