"""Read shards that are no lines of text: Parquet, numpy and `torch.save`.

Their rows become lines of JSON in a temporary file, which `shard_merge` puts in order. Nothing that a file holds is
run: numpy reads no pickles here, and those of torch are read by the closed list of `checkpoints.formats.unpickler`.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from ..errors import DamagedError, UsageError
from .rows import PREDICTION
from .shard_reader import Shard, has_fields

SUFFIXES = (".parquet", ".npy", ".pt")
_BATCH_ROWS = 4096
_READ_BYTES = 1 << 20
# What readers raise for bytes that are not what their file's name says.
_MALFORMED = (DamagedError, ArithmeticError, LookupError, MemoryError, SyntaxError, TokenError, TypeError, ValueError)
_NUMPY = {"bfloat16": "<u2"}  # numpy has no such type: its bits are the upper half of a float32's
Row = dict[str, Any]


def scan_arrays(path: Path, index_field: str | None, spool: Path) -> Shard:
    """Write the rows of a shard into *spool* and find them there.

    Without *index_field* the first has index 0. A file that is cut off holds no row: that is one of its faults.

    Raises:
        UsageError: the rows have no such field, or the file holds no rows.
    """
    shard = Shard(path=path, data=spool)
    with spool.open("wb") as stream:
        try:
            for lines, indices in _batches(path, index_field):
                offset = stream.tell()
                stream.write(b"".join(lines))
                _take_indices(shard, indices if indices is not None else _following(shard, lines))
                shard.offset.extend(accumulate(map(len, lines[:-1]), initial=offset))
                shard.length.extend(map(len, lines))
        except UsageError as error:
            if str(path.parent) in str(error):  # it names the shard, or the file beside it
                raise
            raise UsageError(f"{path}: {error}") from error
        except _MALFORMED as error:
            shard.index, shard.offset, shard.length = array("q"), array("q"), array("q")
            shard.num_corrupt += 1
            shard.faults.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    return shard


def _take_indices(shard: Shard, indices: Sequence[int]) -> None:
    try:
        shard.index.extend(indices)
    except (TypeError, OverflowError) as error:  # such as null, and what needs more than 63 bits
        raise DamagedError(f"{shard.path}: a row's index is no row number: {error}") from error


def _following(shard: Shard, lines: Sequence[bytes]) -> range:
    return range(len(shard.index), len(shard.index) + len(lines))


def _batches(path: Path, index_field: str | None) -> Iterator[tuple[list[bytes], Sequence[int] | None]]:
    """Yield lines and, where the rows say them, their indices."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, index_field)
        return
    indices, are_nested = _companion(path) or (None, False)
    if index_field is None and indices is not None:
        raise UsageError(
            f"{companion_of(path)} says the positions of the rows: merge them by it, without --in-file-order and "
            "--sampler, or move it away"
        )
    num_indices = None if indices is None else len(indices)
    rows = _npy(path) if path.suffix.lower() == ".npy" else _pt(path, num_indices, are_nested)
    done = 0
    for batch in _cut(rows):
        if index_field is None:
            found = None
        elif indices is not None:
            found = indices[done : done + len(batch)]
            if len(found) < len(batch):
                raise UsageError(f"{path} has more rows than the {len(indices):,} indices beside it")
            batch = [{index_field: index, **row} for index, row in zip(found, batch, strict=True)]
            if other := next((one for one in zip(batch, found, strict=True) if one[0][index_field] != one[1]), None):
                said = other[0][index_field]
                raise UsageError(f"{path}: a row's {index_field!r} is {said!r}, and {other[1]} in the file beside it")
        else:
            found = [_index_of(row, index_field, path) for row in batch]
        done += len(batch)
        yield [_line(row) for row in batch], found
    if index_field is not None and indices is not None and done != len(indices):
        raise UsageError(f"{path} has {done:,} rows, and {len(indices):,} indices beside it")


def _cut(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _index_of(row: Row, index_field: str, path: Path) -> int:
    if index_field not in row:
        raise UsageError(f"{path} has no field {index_field!r}; {has_fields(list(row))}")
    value = row[index_field]
    if type(value) is not int:
        raise UsageError(f"{path}: its {index_field!r} is {value!r}, and a row's position is a whole number")
    return value


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=_text_of).encode(errors="replace") + b"\n"


def _text_of(value: Any) -> str:
    """Return as text what JSON has no form for.

    Some writers of Parquet do not say of bytes that they are text.
    """
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _parquet(path: Path, index_field: str | None) -> Iterator[tuple[list[bytes], Sequence[int] | None]]:
    try:
        import pyarrow as pa  # optional, and slow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"reading {path} needs pyarrow: pip install 'sousbatch[data]'") from error
    import orjson

    quick = partial(orjson.dumps, default=_text_of, option=orjson.OPT_APPEND_NEWLINE)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # where the writer has taken them
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise UsageError(f"{path} has more than one column called {twice[0]!r}; give each a name of its own")
            if index_field is not None and index_field not in names:
                raise UsageError(f"{path} has no column {index_field!r}; {has_fields(names)}")
            if index_field is not None and not pa.types.is_integer(file.schema_arrow.field(index_field).type):
                raise UsageError(f"{path}: its column {index_field!r} has no whole numbers")
            for batch in file.iter_batches(_BATCH_ROWS):
                rows = batch.to_pylist()
                encode = _line if _has_nan(batch) else quick  # orjson writes null for NaN
                yield [encode(row) for row in rows], [row[index_field] for row in rows] if index_field else None
    except (pa.ArrowException, OSError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error


def _has_nan(batch: Any) -> bool:
    """Say whether a number of a batch may be NaN or infinite, as those in lists may."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for column in batch.columns:
        if pa.types.is_nested(column.type):
            return True
        if pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column)).as_py():
            return True
    return False


def _companion(path: Path) -> tuple[list[int], bool] | None:
    """Return the indices in the file beside a shard, and whether they lie in batches.

    It is None where there is no such file.
    Beside `a.npy` that is `a.index.npy`; beside `predictions_0.pt`, as Lightning's BasePredictionWriter is documented,
    `batch_indices_0.pt`.
    """
    beside = companion_of(path)
    if beside is None or not beside.is_file():
        return None
    if beside.suffix.lower() == ".npy":
        found = _loaded(beside)
        if found.dtype.kind not in "iu" or found.ndim != 1:
            raise UsageError(
                f"{beside} has {found.dtype} of shape {found.shape}, and indices are whole numbers in a row"
            )
        return [int(one) for one in found], False
    value = _values(_stored(beside))
    items = value if isinstance(value, (list, tuple)) else ()
    are_nested = any(isinstance(_values(one), (list, tuple, np.ndarray)) for one in items)
    return list(_whole_numbers(value, beside)), are_nested


def companion_of(path: Path) -> Path | None:
    """Return the name of the file of indices beside a shard, if its name has one."""
    if path.suffix.lower() == ".npy" and not path.name.endswith(".index.npy"):
        return path.with_suffix(".index.npy")
    if path.suffix.lower() == ".pt" and path.name.startswith("predictions"):
        return path.with_name(path.name.replace("predictions", "batch_indices", 1))
    return None


def is_companion(path: Path) -> bool:
    """Say whether a file holds the indices of another."""
    return path.name.endswith(".index.npy") or (path.suffix.lower() == ".pt" and path.name.startswith("batch_indices"))


def _whole_numbers(value: Any, path: Path) -> Iterator[int]:
    value = _values(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        for one in value.tolist() if isinstance(value, np.ndarray) else value:
            yield from _whole_numbers(one, path)
    elif type(value) is int:
        yield value
    else:
        raise UsageError(f"{path} holds {type(value).__name__}, and indices are whole numbers")


def _loaded(path: Path) -> Any:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, TokenError) as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            raise UsageError(f"{path} holds Python objects, whose loading could run code; save plain arrays") from error
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if isinstance(found, np.memmap) and (more := path.stat().st_size - found.offset - found.nbytes):
        raise DamagedError(f"{path} has {more:,} bytes more than its rows take: its values may have moved")
    return found


def _npy(path: Path) -> Iterator[Row]:
    """Yield a row for each item of the first axis, with its fields if it has any."""
    found = _loaded(path)
    if found.ndim == 0:
        raise UsageError(f"{path} holds one value, and no rows")
    names = found.dtype.names
    for start in range(0, len(found), _BATCH_ROWS):
        for item in found[start : start + _BATCH_ROWS]:
            if names:
                yield {name: item[name].tolist() for name in names}
            else:
                yield {PREDICTION: item.tolist()}


def _stored(path: Path) -> Any:
    from ..checkpoints.formats.torch_zip import load_any

    value = load_any(path)[0]
    if zipfile.is_zipfile(path):
        _check_sums(path)
    return value


def _check_sums(path: Path) -> None:
    """Compare the records of a zip with their checksums."""
    with zipfile.ZipFile(path) as archive:
        for record in filter(lambda one: one.CRC, archive.infolist()):  # torch can be told to take none
            try:
                with archive.open(record) as stream:
                    while stream.read(_READ_BYTES):
                        pass
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
                raise DamagedError(f"{path} cannot be read: {error}") from error


def _pt(path: Path, num_indices: int | None, are_nested: bool) -> Iterator[Row]:
    """Yield the rows of a tensor, of columns, or of a list of rows or batches."""
    value = _values(_stored(path))
    rows = list(_rows(value, num_indices, are_nested)) if not isinstance(value, np.ndarray) else None
    if rows is None:
        if value.ndim == 0:
            raise UsageError(f"{path} holds one value, and no rows")
        yield from ({PREDICTION: item.tolist()} for item in value)
    else:
        yield from rows


def _rows(value: Any, num_indices: int | None, are_nested: bool = False) -> Iterator[Row]:
    if isinstance(value, dict):
        columns = {str(name): _items(one) for name, one in value.items()}
        sizes = {len(one) for one in columns.values() if one is not None}
        if None in columns.values() or len(sizes) != 1:
            yield {str(name): _plain(one) for name, one in value.items()}
            return
        for values in zip(*(one or () for one in columns.values()), strict=True):
            yield dict(zip(columns, map(_plain, values), strict=True))
    elif isinstance(value, (list, tuple)):
        items = [_values(one) for one in value]
        if not _are_batches(items, num_indices, are_nested):
            for item in items:
                yield from _rows(item, None) if isinstance(item, dict) else iter(({PREDICTION: _plain(item)},))
            return
        for batch in items:
            yield from _rows(batch if isinstance(batch, dict) else list(batch), None)
    else:
        raise UsageError(f"a .pt shard holds {type(value).__name__}, and rows are a tensor, a list or named columns")


def _are_batches(items: Sequence[Any], num_indices: int | None, are_nested: bool) -> bool:
    """Say whether the items of a list are batches, and no rows.

    Vectors may be either: they are batches where so many indices lie beside. Where as many fit both, as with batches
    of one row, they are batches if the indices are.
    """
    if not items or not all(isinstance(one, (list, tuple, np.ndarray)) for one in items):
        return False
    if all(isinstance(one, np.ndarray) and one.ndim > 1 for one in items):
        return True
    if any(isinstance(one, np.ndarray) for one in items):
        return num_indices is not None and (
            len(items) != num_indices or (are_nested and sum(map(len, items)) == num_indices)
        )
    inner = [one for item in items for one in item]
    return bool(inner) and not all(isinstance(one, (int, float, bool)) for one in inner)


def _items(value: Any) -> list[Any] | None:
    """Return the items of a column, None where it is no column."""
    value = _values(value)
    return list(value) if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim) else None


def _plain(value: Any) -> Any:
    value = _values(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _values(value: Any) -> Any:
    """Return a stored tensor as an array in the file, anything else as it is.

    Raises:
        UsageError: it is an object of a class, whose value only running its code would give.
    """
    from ..checkpoints.formats.unpickler import StoredTensor, is_foreign

    if is_foreign(value):
        raise UsageError(
            "it holds an object of a class, such as an array or number of numpy, bytes or a set, whose loading could "
            "run code; save tensors, texts, plain numbers and lists, such as array.tolist()"
        )
    if not isinstance(value, StoredTensor):
        return value
    count = math.prod(value.shape)
    kind = np.dtype(_NUMPY.get(value.dtype, value.dtype))
    begin = value.records.offset_of(value.key) + value.first_byte
    if not value.is_contiguous:
        value.segment(0, count)  # which says so
    if count == 0:
        return np.zeros(value.shape, kind)
    if value.first_byte + count * kind.itemsize > value.records.size_of(value.key):
        raise DamagedError(f"{value.path}: a tensor lies outside of its storage")
    found = np.memmap(Path(str(value.path)), kind, "r", begin, value.shape)
    return (found.astype("<u4") << 16).view("<f4") if value.dtype == "bfloat16" else found
