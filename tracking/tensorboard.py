"""Show a task in TensorBoard, by event files in the run's tracking folder.

`tensorboard --logdir` on a folder of runs shows them beside each other.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .identity import Identity, RunIdentity


class TensorBoardTracker:
    """A folder of event files for each stage of a run."""

    _writer: Any
    _open: Callable[[int | None], Any]

    def start(self, identity: Identity) -> None:
        """Say what the run is; the curves begin with their first step."""
        from torch.utils.tensorboard import SummaryWriter

        folder = identity.folder / "tensorboard" / (identity.prefix.rstrip("/") or identity.id)
        writer_class: Any = SummaryWriter
        self._open = lambda step: writer_class(folder, purge_step=step, flush_secs=1)
        self._writer, self._has_rows, self._step = self._open(None), False, 0
        self._writer.add_text("run", f"{identity.name} ({identity.id})\n\n{identity.notes}")
        self._writer.add_text("config", f"```json\n{json.dumps(identity.config, indent=2, ensure_ascii=False)}\n```")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers of a step.

        The first one takes the place of all that earlier attempts had from this step on.
        """
        if not self._has_rows:
            self._writer.close()
            self._writer, self._has_rows = self._open(step), True
        self._step = step
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show final numbers as points at the last step, and texts as texts."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"final/{name}", value, self._step)
            else:
                self._writer.add_text(f"final/{name}", f"```\n{value}\n```")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table as Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))

    def finish(self, exit_code: int) -> None:
        """Write what is left."""
        self._writer.close()

    @staticmethod
    def link(folders: Sequence[Path], run: RunIdentity) -> str:
        """Return the command that shows the runs, beside each other."""
        found = [folder / "tensorboard" for folder in folders if (folder / "tensorboard").is_dir()]
        return f"tensorboard --logdir {shlex.quote(os.path.commonpath(found))}" if found else ""


def _cell(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
