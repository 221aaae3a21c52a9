"""Generate with a model that ZeRO-3 shards over the devices of a task.

This half runs in the job's process. It starts a process for each device (`zero3_rank`), deals out the prompts and puts
the answers in order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from ...cluster import processes
from ...cluster.ports import LOOPBACK, free_port
from ...errors import RunError
from ...recipes.schema import StageSettings
from ...recipes.schema.validate import to_plain
from . import Generation, LoadRequest, Prompt, TokenLogprobs

_LOOK_S = 2.0  # in which a killed rank is found, after another one has failed of it


def load(request: LoadRequest) -> Zero3Engine:
    """Return the engine once every rank has its part of the model.

    Raises:
        RunError: a rank could not load it.
    """
    settings, ranks = request.settings, _Ranks(request.num_devices, request.device)
    folders = {"model_dir": str(request.model_dir), "tokenizer_dir": str(request.tokenizer.name_or_path)}
    places = {"model_class": request.model_class, "device": request.device, "dtype": request.dtype}
    asked = {"settings": to_plain(settings), **folders, **places}
    return Zero3Engine(settings, ranks, ranks.ask([asked] * ranks.count)[0]["config"])


class Zero3Engine:
    """A model in parts that continues prompts, or answers them."""

    def __init__(self, settings: StageSettings, ranks: _Ranks, config: Mapping[str, Any]) -> None:
        self._settings, self._ranks, self._config = settings, ranks, config

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config."""
        return self._config

    def with_settings(self, settings: StageSettings) -> Zero3Engine:
        """Return the same model with other settings of `predict`."""
        return Zero3Engine(settings, self._ranks, self._config)

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return what follows each prompt; every rank gets prompts of all lengths.

        Raises:
            RunError: a rank has failed, or has ended.
        """
        by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
        dealt = [by_length[rank :: self._ranks.count] for rank in range(self._ranks.count)]
        settings = to_plain(self._settings)
        asked = [{"settings": settings, "prompts": [asdict(prompts[one]) for one in places]} for places in dealt]
        found: dict[int, Generation] = {}
        if prompts:
            for places, answer in zip(dealt, self._ranks.ask(asked), strict=True):
                found.update(zip(places, map(_generation, answer["generations"]), strict=True))
        return [found[place] for place in range(len(prompts))]


def _generation(values: Mapping[str, Any]) -> Generation:
    kept = values["logprobs"]
    if kept is not None:
        top = [[(token, value) for token, value in step] for step in kept["top"]]
        kept = TokenLogprobs(chosen=kept["chosen"], top=top)
    return Generation(ids=values["ids"], ended=values["ended"], logprobs=kept)


class _Ranks:
    """The processes, one for each device.

    They end with this object, and with this process.
    """

    def __init__(self, count: int, device: str) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._end = weakref.finalize(self, _end, self._processes, self._pipes)
        meeting = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
        accelerator = {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
        for rank in range(count):
            ours, theirs = Pipe()
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            own = {name: str(number) for name, number in numbers.items()}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", "-m", "sousbatch.jobs.generation.zero3_rank", str(theirs.fileno())],
                    env=processes.child_environment(os.environ | meeting | accelerator | own),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            )
            theirs.close()  # so that a rank's end is seen here
            self._pipes.append(ours)

    def ask(self, requests: Sequence[Any]) -> list[Any]:
        """Return the answer of each rank to its request.

        Raises:
            RunError: a rank has failed, or has ended; all are ended then, since the others wait for it.
        """
        found: dict[int, Any] = {}
        try:
            for pipe, request in zip(self._pipes, requests, strict=True):
                pipe.send_bytes(json.dumps(request).encode())
            waiting = dict(enumerate(self._pipes))
            while waiting:
                ready = wait(waiting.values())
                for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                    found[rank] = _answer(waiting.pop(rank).recv_bytes())
        except RunError:
            self._end()
            raise
        except (EOFError, OSError, RuntimeError) as error:
            how = self._how_killed() or f"a rank of engine zero3 failed: {str(error) or 'it has ended'}"
            self._end()
            raise RunError(f"{how}; the log above may say why") from error
        return [found[rank] for rank in range(self.count)]

    def _how_killed(self) -> str:
        """Say which rank was killed. The others fail of it, and may say so sooner."""
        deadline = time.monotonic() + _LOOK_S
        while time.monotonic() < deadline:
            for rank, process in enumerate(self._processes):
                if (process.poll() or 0) < 0:
                    return f"rank {rank} of engine zero3 was killed by signal {-process.returncode}"
            time.sleep(0.02)
        return ""


def _answer(text: bytes) -> Any:
    found = json.loads(text)
    if "error" in found:
        raise (RunError if found["is_clear"] else RuntimeError)(found["error"])
    return found


def _end(running: Sequence[subprocess.Popen[bytes]], pipes: Sequence[Connection]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in running:
        process.kill()
    for process in running:
        process.wait()
