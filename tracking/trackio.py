"""Show a task as a run of trackio.

It lies in the run's tracking folder, or where the environment says.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from .identity import Identity, RunIdentity

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID")


class TrackioTracker:
    """A run of trackio, which attempts and stages continue."""

    _run: Any

    def start(self, identity: Identity) -> None:
        """Open the run, or that of earlier attempts; offline it stays on this machine."""
        os.environ.setdefault("TRACKIO_DIR", str(identity.folder / "trackio"))  # read when trackio is imported
        if identity.mode == "offline":
            for name in _REMOTE:
                os.environ.pop(name, None)
        with redirect_stdout(StringIO()):  # it greets
            import trackio

            self._trackio, self._prefix = trackio, identity.prefix
            self._run = trackio.init(
                project=identity.project,
                name=f"{identity.name} {identity.id}",
                group=identity.group,
                config={**identity.config, "notes": identity.notes},
                resume="allow",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the values of a step."""
        self._run.log({f"{self._prefix}{name}": value for name, value in values.items()}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add final values, which trackio has no place of their own for."""
        self._run.log({f"{self._prefix}final/{name}": value for name, value in values.items()})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a small table."""
        found = self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({f"{self._prefix}{name}": found})

    def finish(self, exit_code: int) -> None:
        """Write what is left."""
        with redirect_stdout(StringIO()):
            self._run.finish()

    @staticmethod
    def link(folders: Sequence[Path], run: RunIdentity) -> str:
        """Return the command that shows the run.

        Each point of a sweep has a folder of its own, and needs a command of its own.
        """
        found = [folder / "trackio" for folder in folders if (folder / "trackio").is_dir()]
        command = f"trackio show --project {shlex.quote(run.project)}"
        return f"TRACKIO_DIR={shlex.quote(str(found[0]))} {command}" if len(found) == 1 else ""
