"""Say what is wrong with text that is not UTF-8, and how to convert it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from ...errors import UsageError

_NUM_LINES = 100_000  # that are looked at, to tell a whole file from a line in another encoding
_UNPACKERS = {".gz": "gunzip -c", ".zst": "zstd -dc"}


def check_sign(path: Path, name: str, start: bytes) -> None:
    """Refuse a file that says by its first bytes that it is in UTF-16."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{name} is in UTF-16 and not UTF-8; {_converted(path, 'UTF-16')}")


def decoding_fault(path: Path, name: str, number: int, line: bytes, lines: Iterable[bytes]) -> str:
    """Return why a line of a file cannot be read as UTF-8, "" where it can.

    *lines* are those of the file, which tell whether all of it is in the line's encoding.
    """
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = _encoding_of(line)
        found = f"{name}, line {number} is not UTF-8 but, as it seems, {encoding} (from byte {error.start + 1} on: "
        found += f"{line[error.start : error.start + 8].hex(' ')})"
        if any(_is_utf8(one) for one in islice(lines, _NUM_LINES)):
            return f"{found}, while other lines are UTF-8; {_converted_lines(path, encoding)}"
        return f"{found}; {_converted(path, encoding)}"
    return ""


def _is_utf8(line: bytes) -> bool:
    """Say whether a line has signs beyond ASCII, in UTF-8."""
    return not line.isascii() and line.decode("utf-8", "ignore").encode() == line


def _encoding_of(line: bytes) -> str:
    """Guess the encoding of a line that is not UTF-8.

    Korean bytes are all pairs, which Western text hardly is.
    """
    with suppress(UnicodeDecodeError):
        if any("\uac00" <= sign <= "\ud7a3" for sign in line.decode("cp949")):
            return "CP949"
    return "WINDOWS-1252"


def _converted(path: Path, encoding: str) -> str:
    return f"if all of it is, write it again: {converted(path, f'iconv -f {encoding} -t UTF-8', 'utf8')}"


def _converted_lines(path: Path, encoding: str) -> str:
    is_right = "b.decode('utf-8','ignore').encode()==b"
    code = f"w(b if {is_right} else b.decode('{encoding}').encode())"
    program = f"import sys; w=sys.stdout.buffer.write; [{code} for b in sys.stdin.buffer]"
    return f"fix them, or write those lines again: {converted(path, f'python -c {shlex.quote(program)}', 'utf8')}"


def converted(path: Path, command: str, form: str) -> str:
    """Return what a shell runs to send a file through *command* into a new one.

    The new one is called after its *form*.
    """
    unpacker = _UNPACKERS.get(path.suffix.lower())
    plain = path.with_suffix("") if unpacker else path
    target = shlex.quote(f"{plain.with_suffix('')}-{form}{plain.suffix}")
    if unpacker:
        return f"{unpacker} {shlex.quote(str(path))} | {command} > {target}"
    return f"{command} < {shlex.quote(str(path))} > {target}"
