"""What docs/python.md shows works, on a run that is finished already."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("finished")
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_code_of_the_page_works(finished, small):
    place, _ = finished
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    code = code.replace('["train.steps=200"]', repr([*small, "tracking.mode=offline"]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=place.environment, cwd=place.root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = place.run_dir()
    for line in (f"{run.name} {run}", str(run / "model/consolidate"), "train done 6 6", "24 True"):
        assert line in done.stdout.splitlines()
    assert (place.root / "my-model" / "model.safetensors").is_file()
