"""A run that is tracked: its identity lies in its tracking folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sousbatch.tracking.identity import RunIdentity, write_identity
from sousbatch.tracking.wandb_files import Part, Sent, write_records

from .stand_in import StandIn

RUN = "0123456789ab"


def make_identity(**changes: Any) -> RunIdentity:
    values: dict[str, Any] = {"recipe": "toy", "run": RUN, "group": RUN, "mode": "offline"}
    values |= {"per": "run", "folder": "/runs/toy/0123456789ab", "told": (), "config": {"seed": 2}}
    values |= {"trackers": ("wandb",), "project": "our-project", "entity": None, "tags": ()}
    return RunIdentity(**values | changes)


@pytest.fixture
def tracked(tmp_path: Path) -> Callable[..., Path]:
    """Write the identity of a run and return its tracking folder."""

    def write(**changes: Any) -> Path:
        write_identity(make_identity(**changes), tmp_path / "tracking")
        return tmp_path / "tracking"

    return write


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A W&B server that this process and its children have a key and a route for."""
    server = StandIn()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in server.variables().items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def recorded(tracked: Callable[..., Path]) -> Callable[..., Path]:
    """Write the file of an attempt that was offline, as wandb does, and return it."""
    number = iter(range(10, 60))

    def write(attempt: int, steps: Sequence[int], exit_code: int | None = 0, **identity: Any) -> Path:
        from wandb.proto import wandb_internal_pb2 as protocol

        folder = tracked(mode="auto", **identity)
        records = [protocol.Record(run=protocol.RunRecord(run_id=RUN, project="our-project", resume=True))]
        records[0].run.config.update.add(key="attempt", value_json=str(attempt))
        for place, step in enumerate(steps):
            row = protocol.HistoryRecord(step=protocol.HistoryStep(num=place))
            values = {"train/step": step, "train/loss": 1 / (step + 1), "_step": place, "_runtime": 0, "_timestamp": 1}
            for key, value in values.items():
                row.item.add(key=key, value_json=json.dumps(value))
            records.append(protocol.Record(history=row))
        if exit_code is not None:
            records.append(protocol.Record(exit=protocol.RunExitRecord(exit_code=exit_code)))
        path = folder / f"wandb/train-0-{attempt}/wandb/offline-run-20260101_0000{next(number)}-{RUN}/run-{RUN}.wandb"
        (path.parent / "files").mkdir(parents=True)
        like = folder / "header"
        like.write_bytes(b":W&B\xe1\xbe\x00")
        write_records(path, like, records)
        Part(folder=path.parents[2]).write(Sent())
        return path

    return write
