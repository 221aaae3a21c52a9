"""What this machine says it has."""

from __future__ import annotations

import os

import pytest

from sousbatch.cluster import site

MIB = 1 << 20


def test_this_machine_has_cores_and_memory() -> None:
    here = site.this_machine()
    assert here.launcher == "local"
    assert here.cpus_per_node == len(os.sched_getaffinity(0))
    assert here.memory_bytes > 100 * MIB


@pytest.mark.parametrize(
    "text, expected",
    [("", []), ("81559\n", [81559 * MIB]), (" 24564 \n24564\n\n", [24564 * MIB] * 2), ("[N/A]\n", [0])],
)
def test_the_lines_of_nvidia_smi_are_read(text: str, expected: list[int]) -> None:
    assert site.parse_memories(text) == expected


@pytest.mark.parametrize(
    "names, expected",
    [
        (None, [10, 20, 30]),
        ("", []),
        ("-1", []),
        ("2,0", [30, 10]),
        ("0,-1,1", [10]),
        ("7", []),
        ("GPU-5c4f, MIG-77", [10, 10]),
    ],
)
def test_only_the_visible_devices_count(names: str | None, expected: list[int]) -> None:
    assert site._visible([10, 20, 30], names) == expected
