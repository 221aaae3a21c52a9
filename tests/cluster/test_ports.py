"""Ports that stay free until the ranks bind them."""

from __future__ import annotations

import socket

import pytest

from sousbatch.cluster import ports


def test_a_port_lies_outside_the_ephemeral_range_and_can_be_bound() -> None:
    low, high = ports._ephemeral_range()
    for _ in range(50):
        port = ports.free_port()
        assert 1024 < port < 65536 and not low <= port <= high
        with socket.socket() as taken:
            taken.bind((ports.LOOPBACK, port))


def test_a_taken_port_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((ports.LOOPBACK, 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "_ephemeral_range", lambda: (1, 9_999))
        monkeypatch.setattr("random.SystemRandom.sample", lambda self, items, k: [port, port])
        with pytest.raises(OSError, match="no free port at 127.0.0.1"):
            ports.free_port()


def test_where_all_ports_are_ephemeral_one_of_them_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_ephemeral_range", lambda: (1_024, 65_535))
    assert 10_000 <= ports.free_port() < 60_000
