"""What `doctor` says of the machine's Slurm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cluster.sandbox import build, lifecycle

needs_slurm = pytest.mark.skipif(bool(build.missing_packages()), reason="Slurm is not installed")


def said(run: Callable[..., Any]) -> str:
    code, out, _ = run("doctor")
    assert code == 0
    return next(line for line in out.splitlines() if " Slurm: " in line)


def test_a_slurm_that_answers_is_named_with_its_version(
    slurm: lifecycle.Sandbox, sousbatch: Callable[..., Any]
) -> None:
    line = said(sousbatch)
    assert line.startswith("ok ") and line.endswith(f"sbatch; Slurm ({slurm.cluster} {slurm.version}) answers")


@needs_slurm
def test_a_slurm_that_does_not_answer_is_told_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sousbatch: Callable[..., Any]
) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=gone\nSlurmctldHost=here(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=1\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    line = said(sousbatch)
    assert line.startswith("LACKS ") and "sbatch, slurm" in line and ", but scontrol: " in line


def test_no_slurm_is_no_lack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sousbatch: Callable[..., Any]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said(sousbatch) == "-     Slurm: no sbatch: stages run on this machine"


@needs_slurm
def test_slurms_commands_without_a_configuration_are_no_lack(sousbatch: Callable[..., Any]) -> None:
    line = said(sousbatch)  # the tests' own SLURM_CONF is an empty file
    assert line.startswith("-     Slurm: ") and "no Slurm is configured" in line
