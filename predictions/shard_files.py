"""Find the shards of other trainers by their names.

What cannot be merged is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import NotFoundError, UsageError
from ..files import refuse_input
from .array_reader import SUFFIXES, is_companion
from .merge import report_path
from .samplers import by_number
from .units import is_unit

_SUFFIXES = (".jsonl", ".csv", *SUFFIXES)
# Such as rank3.jsonl.gz, rank3.jsonl.tmp and RANK3.JSONL.
_SUFFIX_WITHIN = re.compile("|".join(rf"\{suffix}\b" for suffix in _SUFFIXES), re.IGNORECASE)
_OTHER_OUTPUTS = (*SUFFIXES, ".tsv", ".xlsx", ".gz", ".zst", ".bz2", ".xz", ".zip")


def find_shards(paths: Sequence[Path]) -> list[Path]:
    """Return the shards that *paths* name: files, and those of folders by number.

    Raises:
        NotFoundError: there are none.
        UsageError: a folder holds files of several formats.
    """
    found = [file for path in paths for file in (_shards_in(path) if path.is_dir() else [path])]
    found = [path for path in found if not is_companion(path)]
    if not found:
        raise NotFoundError(f"{', '.join(map(str, paths))}: no {', '.join(_SUFFIXES)} shards there")
    return found


def kinds_of(paths: Sequence[Path], out_path: Path) -> set[str]:
    """Return the endings of the shards' names; refuse what cannot be merged."""
    if not paths:
        raise UsageError("there are no shards to merge")
    if lost := [str(path) for path in paths if not path.exists()]:
        raise NotFoundError(f"no such shard: {', '.join(lost)}")
    if odd := [str(path) for path in paths if not path.is_file()]:
        raise UsageError(f"{odd[0]}: a shard is read twice, and this is no regular file; write it to one")
    refuse_input(out_path, paths)
    if unit := next((path for path in paths if is_unit(path)), None):
        raise UsageError(
            f"{unit} is a unit of a run, and no shard: units of other predictions could be mixed in; name their folder "
            f"alone, {unit.parent}"
        )
    kinds = {path.suffix.lower() for path in paths}
    if ".tsv" in kinds:
        raise UsageError(
            f"{next(path for path in paths if path.suffix.lower() == '.tsv')} has tabs; write it with commas, as .csv"
        )
    all_kinds = kinds | {out_path.suffix.lower()}
    if ".csv" in all_kinds and len(all_kinds) > 1:
        raise UsageError(f"CSV shards merge into a CSV file; here are {', '.join(sorted(all_kinds))}")
    if kinds & set(SUFFIXES) and (len(kinds) > 1 or all_kinds & set(SUFFIXES) != kinds or len(all_kinds) != 2):
        raise UsageError(f"{', '.join(sorted(kinds))} shards merge into a .jsonl file, and are all of one format")
    if out_path.suffix.lower() in _OTHER_OUTPUTS:
        raise UsageError(f"{out_path} would hold lines of JSON: call it .jsonl; --export writes other formats")
    return kinds


def named_again(paths: Sequence[Path]) -> Path | None:
    """Return a file that *paths* name a second time."""
    seen = set[Path]()
    for path in paths:
        if (real := path.resolve()) in seen:
            return path
        seen.add(real)
    return None


def _shards_in(folder: Path) -> list[Path]:
    there = [path for path in folder.iterdir() if path.is_file() and not is_companion(path)]
    found = [path for path in there if path.suffix in _SUFFIXES]
    if odd := sorted(path.name for path in there if path.suffix not in _SUFFIXES and _may_be_shard(path)):
        raise UsageError(
            f"{folder} holds {odd[0]!r}, which may be a shard that is packed or was not finished; unpack or remove it, "
            "or name the shards"
        )
    if len(kinds := sorted({path.suffix for path in found})) > 1:
        raise UsageError(
            f"{folder} holds {' and '.join(kinds)} files; name the shards, such as {folder}/*{kinds[0]}, "
            "or remove the others"
        )
    return sorted(found, key=lambda path: by_number(path.name))


def _may_be_shard(path: Path) -> bool:
    """Say whether a name hides the ending of a shard.

    What an earlier merge left is none.
    """
    is_left = path.suffix == ".partial" and report_path(path.with_suffix("")).exists()
    return not path.name.startswith(".") and not is_left and bool(_SUFFIX_WITHIN.search(path.name))
