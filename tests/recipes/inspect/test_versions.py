"""What jobs will import: asked of the interpreter and the set-up lines that the recipe names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sousbatch.errors import PlanError
from sousbatch.recipes.inspect.versions import installed, versions_of
from sousbatch.recipes.schema import Environment


def test_this_interpreter_is_asked_without_a_process() -> None:
    assert versions_of(Environment()) == installed()
    assert installed()["torch"] and installed()["python"] == sys.version.split()[0]


def test_another_interpreter_and_its_set_up_lines_are_asked_as_a_job_would_start_them(tmp_path: Path) -> None:
    wrapper = tmp_path / "a python's"
    wrapper.write_text(f'#!/bin/sh\necho "$GREETING" >&2\n[ "$GREETING" = hello ] && exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    environment = Environment(python=str(wrapper), setup=("export GREETING=hello", "echo loaded modules"))
    assert versions_of(environment) == installed()
    with pytest.raises(PlanError, match="cannot run jobs"):
        versions_of(Environment(python=str(wrapper)))


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match="'/no/python' cannot run jobs: .*/no/python"):
        versions_of(Environment(python="/no/python"))


def test_what_is_inside_a_container_is_not_known() -> None:
    assert versions_of(Environment(container="image.sif", python="/no/python")) == {}
