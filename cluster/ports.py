"""The meeting point of ranks: an address, and a port that stays free for it."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"


def free_port(address: str = LOOPBACK) -> int:
    """Return a free TCP port outside the kernel's ephemeral range.

    A port inside that range can be taken by any outgoing connection between this look and the
    ranks' bind (pytorch#126510); below it only a server that asks for it can.

    Raises:
        OSError: every port that was tried is taken.
    """
    low, high = _ephemeral_range()
    outside = [port for port in range(10_000, 60_000) if not low <= port <= high]
    candidates = outside or list(range(10_000, 60_000))
    for port in random.SystemRandom().sample(candidates, k=min(200, len(candidates))):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port at {address}")


def _ephemeral_range() -> tuple[int, int]:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return 32_768, 60_999
    return int(low), int(high)
