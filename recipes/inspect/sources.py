"""Find the files of a split, and make one local file of them.

A plain file that lies here is read where it lies. Everything else (URLs, names of `datasets`, packed files, several
files) is copied into the cache once, and what is packed or several is written there as one file of JSON lines.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit

from ... import files
from ...errors import SousbatchError, UsageError
from ...remote import Place, RemotePath, parse_place, read_blocks, read_size
from ...user_folders import cache_dir
from ..data.rows import FORMATS, PACKED, format_of, read_rows
from ..facts import SplitPart
from .cache import file_digest, made_once

_FORMAT = 1  # raised when files are joined in another way
_BLOCK_ROWS = 1000
_DATASETS = "hf:"  # before the name of a dataset; hf:// is a URL of a file


@dataclass(frozen=True, kw_only=True)
class Source:
    """The local file of a split, and the files that it was made of, if it was."""

    path: Path
    parts: tuple[SplitPart, ...] = ()


def find_source(split: str, texts: Sequence[str]) -> Source:
    """Return the local file of the rows that *texts* name, in their order.

    A text is a path, a pattern, a URL, or such as `hf:org/name?config=ynat&split=train`.

    Raises:
        UsageError: there is no such file, it cannot be fetched or read, or the cache is full.
    """
    found = [one for text in texts for one in _local_files(split, text)]
    if not found:
        raise UsageError(f"data.splits.{split} names no file")
    (name, path), *more = found
    if not more and path.suffix.lower() not in PACKED:
        format_of(path, name)
        return Source(path=path)
    return _joined(split, found)


def _joined(split: str, found: Sequence[tuple[str, Path]]) -> Source:
    """Write the rows of several or packed files into one, by the files' digests."""
    key = files.digest_of([_FORMAT, [[format_of(path, name), file_digest(path)] for name, path in found]])
    joined = cache_dir() / "data" / key[:16] / "rows.jsonl"
    counts_file = joined.with_name("counts.json")

    def write(stream: IO[bytes]) -> None:
        counts = [_write_rows(stream, read_rows(path, name), name) for name, path in found]
        files.write_json(counts_file, counts)

    num_bytes = sum(path.stat().st_size for _, path in found)
    made_once(joined, f"data.splits.{split}", num_bytes, write)
    counts = files.read_json(counts_file)
    parts = (SplitPart(name=name, num_rows=count) for (name, _), count in zip(found, counts, strict=True))
    return Source(path=joined, parts=tuple(parts))


def _write_rows(stream: IO[bytes], rows: Iterator[Mapping[str, Any]], name: str) -> int:
    """Write rows as JSON lines and return how many."""
    import orjson

    options, lines, count = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_APPEND_NEWLINE, list[bytes](), 0
    for count, row in enumerate(rows, 1):
        try:
            lines.append(orjson.dumps(row, default=_text_of, option=options))
        except TypeError as error:
            column = next((key for key, value in row.items() if isinstance(value, bytes)), "?")
            raise UsageError(f"{name}, row {count}: column {column!r} holds no text but bytes: {error}") from error
        if len(lines) == _BLOCK_ROWS:
            stream.write(b"".join(lines))
            lines.clear()
    stream.write(b"".join(lines))
    return count


def _text_of(value: Any) -> str:
    """Return the text of a date or the like; bytes have none."""
    if isinstance(value, bytes):
        raise TypeError("it holds bytes and no text")
    return str(value)


def _local_files(split: str, text: str) -> Iterator[tuple[str, Path]]:
    """Yield the local files that *text* names, with what messages call them."""
    if "://" in text:
        yield from _from_url(split, text)
    elif text.startswith(_DATASETS):
        yield text, _from_datasets(split, text)
    else:
        path = Path(text).expanduser()
        if path.is_file():
            yield text, path.resolve()
        elif matches := [Path(one) for one in sorted(glob.glob(str(path), recursive=True)) if Path(one).is_file()]:
            yield from ((str(one), one.resolve()) for one in matches)
        else:
            raise UsageError(f"data.splits.{split}: {_why_no_file(text, path)}")


def _from_url(split: str, text: str) -> Iterator[tuple[str, Path]]:
    try:
        place = parse_place(text)
        places = [place] if text.startswith("http") else _matches(place)
    except Exception as error:
        raise _unfetched(split, text, error) from error
    if not places:
        raise UsageError(f"data.splits.{split}: {text!r} matches no file")
    for one in places:
        url = text if places == [place] else str(one)
        yield url, _fetched(split, url, one)


def _matches(place: Place) -> list[Place]:
    """Return the files that match a place with a pattern, else the place itself."""
    if isinstance(place, Path):
        return [Path(one) for one in sorted(glob.glob(str(place)))] if glob.has_magic(str(place)) else [place]
    is_pattern = glob.has_magic(place.path)
    return [RemotePath(place.fs, one) for one in sorted(place.fs.glob(place.path))] if is_pattern else [place]


def _fetched(split: str, url: str, place: Place) -> Path:
    """Return the copy of a file behind a URL, which is fetched once."""
    path = cache_dir() / "data" / files.digest_of(url)[:16] / (urlsplit(url).path.rpartition("/")[2] or "data")
    if path.is_file():
        return path
    try:
        format_of(path, url)
        return made_once(
            path, f"data.splits.{split}", read_size(place), lambda stream: stream.writelines(read_blocks(place))
        )
    except UsageError:
        raise
    except Exception as error:  # each store has errors of its own; hf:// alone has those of three libraries
        raise _unfetched(split, url, error) from error


def _from_datasets(split: str, text: str) -> Path:
    """Return the rows of a dataset of the hub, or of a folder that `datasets` reads.

    They are streamed into the cache once.
    """
    name, _, query = text.removeprefix(_DATASETS).partition("?")
    asked = dict(parse_qsl(query))
    if unknown := sorted(set(asked) - {"config", "split", "revision"}):
        raise UsageError(f"data.splits.{split}: {text!r} has {unknown[0]!r}; known: config, split, revision")

    folder = Path(name).expanduser()
    beneath = sorted(folder.rglob("*")) if folder.is_dir() else []  # else a name of the hub, which is asked once
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in beneath]

    def write(stream: IO[bytes]) -> None:
        from datasets import disable_progress_bars, load_dataset
        from huggingface_hub import HfApi

        disable_progress_bars()
        wanted, revision = asked.get("split", split), asked.get("revision")
        if not beneath:  # a hub that does not answer is seen at once; `datasets` would ask it five times
            revision = HfApi().dataset_info(name, revision=revision, timeout=10).sha
        place = str(folder.resolve()) if beneath else name
        found = load_dataset(place, asked.get("config"), split=wanted, revision=revision, streaming=True)
        _write_rows(stream, iter(found), text)

    try:
        path = cache_dir() / "data" / files.digest_of([text, split, stamps])[:16] / "rows.jsonl"
        return made_once(path, f"data.splits.{split}", 0, write)
    except ImportError as error:
        raise UsageError(f"data.splits.{split}: {text!r} needs datasets: pip install 'sousbatch[data]'") from error
    except UsageError:
        raise
    except Exception as error:
        raise _unfetched(split, text, error) from error


def _unfetched(split: str, text: str, error: Exception) -> SousbatchError:
    reason = error.__cause__ or error
    lines = str(reason).strip().splitlines() or [""]
    shown = f"{type(reason).__name__}: {lines[0][:300]}" if not isinstance(reason, SousbatchError) else str(reason)
    return UsageError(f"data.splits.{split}: {text!r} cannot be fetched: {shown}")


def _why_no_file(text: str, path: Path) -> str:
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.is_file())
        suffix = next((Path(name).suffix for name in names if Path(name).suffix in FORMATS), ".jsonl")
        there = f"; it holds {', '.join(names[:5])}" if names else ""
        return f"{text!r} is a folder; name its files, such as {str(Path(text) / f'*{suffix}')!r}{there}"
    if glob.has_magic(text):
        return f"the pattern {text!r} matches no file: looked in {path.absolute().parent}"
    if "," in text:
        return f"{text!r} is no file; several are a list: [{text}]"
    where = "" if Path(text).is_absolute() else "; relative paths start at the working folder, not at the recipe"
    return f"file {text!r} does not exist: looked for {path.absolute()}{where}"
