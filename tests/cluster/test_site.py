"""What this machine says it has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sousbatch.cluster import site

MIB = 1 << 20


def test_this_machine_has_cores_and_memory() -> None:
    here = site.this_machine()
    assert here.launcher == "local"
    assert 0 < here.cpus_per_node <= len(os.sched_getaffinity(0))
    assert here.memory_bytes > 100 * MIB


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", (1, 3, 5)), ("200000 100000", (1, 3)), ("50000 100000", (1,)), ("900000 100000", (1, 3, 5))],
)
def test_cores_are_those_of_the_affinity_as_many_as_the_cgroup_pays_for(
    text: str, expected: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(site, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 1, 3})
    assert site.usable_cores() == expected


ROWS = "0, GPU-5c4f-1, 10\n1, GPU-77aa-2, 20\n 2, GPU-9b00-3, [N/A] \n\n"


@pytest.mark.parametrize(
    "text, names, expected",
    [
        ("", None, []),
        (ROWS, None, [("0", "0", 10), ("1", "1", 20), ("2", "2", 0)]),
        (ROWS, "", []),
        (ROWS, "-1", []),
        (ROWS, "1, 0", [("1", "1", 20), ("0", "0", 10)]),
        (ROWS, "0,-1,1", [("0", "0", 10)]),
        (ROWS, "7", []),
        (ROWS, "1,GPU-77aa,0", [("1", "1", 20)]),
        (ROWS, "GPU-77, MIG-4d", [("1", "GPU-77", 20), ("MIG-4d", "MIG-4d", 0)]),
    ],
)
def test_only_the_visible_devices_count_each_by_one_key(
    text: str, names: str | None, expected: list[tuple[str, str, int]]
) -> None:
    found = [(gpu.key, gpu.name, gpu.memory_bytes // MIB) for gpu in site.shown(text, names)]
    assert found == expected
