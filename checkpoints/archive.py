"""Move checkpoints to a folder or URL.

They are uploaded, read back and compared, and only then removed here.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import files
from ..errors import FencedError, RunError, SousbatchError
from ..remote import copy_verified, parse_place
from .commit import MARKER, Checkpoint


def upload(checkpoint: Checkpoint, url: str, check_fence: Callable[[], None]) -> None:
    """Copy a committed checkpoint below *url*, its marker last.

    Files that are there intact already are left. An archive that was cut off has no marker, so it is no checkpoint; the
    next upload writes it again.

    Raises:
        RunError: the archive cannot be reached, or does not give back what it was sent.
    """
    try:
        target = parse_place(url) / checkpoint.path.name
        marker = (checkpoint.path / MARKER).read_bytes()
        if (target / MARKER).is_file() and (target / MARKER).read_bytes() == marker:
            return
        for name in [*sorted(files.read_json(checkpoint.path / MARKER)["files"]), MARKER]:
            check_fence()
            copy_verified(checkpoint.path / name, target / name)
    except FencedError:
        raise
    except (OSError, ValueError, SousbatchError) as error:
        raise RunError(f"the archive {url} did not take {checkpoint.path.name}: {error}") from error
