"""A torch file is read without torch, and nothing that it says is run."""

from __future__ import annotations

import collections
import datetime
import os
import pathlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sousbatch.checkpoints.formats.torch_zip import load_state
from sousbatch.checkpoints.formats.unpickler import StoredTensor
from sousbatch.cli.main import main
from sousbatch.errors import DamagedError, NotFoundError, UsageError


class Hostile:
    """Pickles into a call of os.system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@dataclass
class Settings:
    """A class that the reader cannot and need not import."""

    depth: int


class Colour:
    """A class that is called to make one, as most enumerations are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Colour, ()


def test_a_call_in_a_pickle_is_refused_by_name_and_not_made(tmp_path: Path) -> None:
    torch.save({"module": Hostile(tmp_path / "called")}, tmp_path / "x.pt")
    with pytest.raises(DamagedError, match=r"x\.pt: loading it would call posix\.system.*was not called"):
        load_state(tmp_path / "x.pt")
    assert not (tmp_path / "called").exists()


def test_an_unknown_class_that_is_called_is_refused_too(tmp_path: Path) -> None:
    torch.save({"colour": Colour()}, tmp_path / "x.pt")
    with pytest.raises(DamagedError, match="would call .*Colour"):
        load_state(tmp_path / "x.pt")


def test_a_hidden_call_through_a_tensor_subclass_is_refused(tmp_path: Path) -> None:
    class Hidden:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, ("true",), {})

    torch.save({"module": Hidden()}, tmp_path / "x.pt")
    with pytest.raises(DamagedError, match="would call posix.system"):
        load_state(tmp_path / "x.pt")


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


SYSTEM, COMMAND = stack_global("os", "system"), b"(" + text("touch called")
REBUILD, FLOATS = stack_global("torch._utils", "_rebuild_tensor_v2"), stack_global("torch", "FloatStorage")
ZERO_STAGE = stack_global("deepspeed.runtime.zero.config", "ZeroStageEnum")
STORAGE = b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"K\x0atQ"
SET_INIT = b"N}" + text("__init__") + SYSTEM + b"s\x86b"  # BUILD with a state for the slots: a plain setattr
HOSTILE = {
    "STACK_GLOBAL and REDUCE": (SYSTEM + COMMAND + b"tR.", r"would call os\.system"),
    "INST": (COMMAND + b"iposix\nsystem\n.", r"would call posix\.system"),
    "OBJ": (b"(cposix\nsystem\n" + COMMAND[1:] + b"o.", r"would call posix\.system"),
    "a reduce in a reduce": (
        stack_global("builtins", "set") + b"(" + SYSTEM + COMMAND + b"tRtR.",
        r"would call os\.system",
    ),
    "getattr": (stack_global("builtins", "getattr") + b"(NNtR.", r"would call builtins\.getattr"),
    "getattr of a class that is known": (
        stack_global("builtins", "getattr") + b"(" + ZERO_STAGE + text("__class__") + b"tR.",
        r"would call builtins\.getattr",
    ),
    "getattr of a module's": (
        stack_global("__builtin__", "getattr") + b"(" + SYSTEM + text("weights") + b"tR.",
        r"would call builtins\.getattr",
    ),
    "a partial": (stack_global("functools", "partial") + b"(" + SYSTEM + b"tR)R.", r"would call functools\.partial"),
    "NEWOBJ": (stack_global("subprocess", "Popen") + COMMAND + b"t\x81\x85.", "holds tuple, not the mapping"),
    "a name of many parts": (stack_global("collections", "OrderedDict.__init__.__globals__") + b".", "not the mapping"),
    "__setstate__ in a state": (
        SYSTEM + b")\x81}" + text("__setstate__") + SYSTEM + b"sb" + COMMAND[1:] + b"b\x85.",
        "holds tuple, not the mapping",
    ),
    "BUILD on a class of the file": (stack_global("x", "Y") + SET_INIT + COMMAND + b"tR.", "not what torch.save"),
    "BUILD on a class of ours": (stack_global("collections", "OrderedDict") + SET_INIT + b".", "not what torch.save"),
    "BUILD on a function of ours": (REBUILD + SET_INIT + b".", "not what torch.save"),
    "BUILD on a tensor": (
        REBUILD + b"(" + STORAGE + b"K\x00K\x05\x85K\x01\x85\x89}tR" + b"N}" + text("key") + text("../x") + b"s\x86b.",
        "not what torch.save",
    ),
    "a persistent id that is a number": (b"K\x05Q.", "not what torch.save"),
    "a persistent id of a wrong type": (
        b"(" + text("storage") + b"N" + text("0") + b"NK\x05tQ.",
        "not what torch.save",
    ),
    "a persistent id that names nothing": (
        b"(" + text("storage") + FLOATS + text("../1") + b"NK\x05tQ.",
        "not what torch.save",
    ),
    "a storage of 2^127 elements": (
        b"(" + text("storage") + FLOATS + text("0") + b"N\x8a\x10" + b"\x7f" * 16 + b"tQ.",
        "storage 0 has 40 bytes",
    ),
    "a tensor of no storage": (REBUILD + b"(NK\x00K\x05\x85K\x01\x85\x89}tR.", "not what torch.save"),
    "a tensor of words": (REBUILD + b"(" + STORAGE + b"K\x00" + text("a") * 2 + b"\x89}tR.", "not what torch.save"),
    "bytes of 2^62": (b"\x8e" + (1 << 62).to_bytes(8, "little") + b"x.", "x.pt"),
    "a frame of 2^62": (b"\x95" + (1 << 62).to_bytes(8, "little") + b"N.", "cut off or damaged"),
    "a number of 5,000 digits": (
        stack_global("deepspeed.runtime.zero.config", "ZeroStageEnum") + b"(" + text("9" * 5000) + b"tR.",
        "not what torch.save",
    ),
    "a hundred thousand nested lists": (b"]" * 100_000 + b"a" * 99_999 + b".", "holds list, not the mapping"),
    "a tuple that doubles forty times": (
        b"K\x01\x85" + b"".join(b"q%c0(h%ch%ct" % (i, i, i) for i in range(1, 41)) + b".",
        "holds tuple, not the mapping",
    ),
    "an extension code": (b"\x82\x01.", "not what torch.save"),
    "no end": (b"}", "cut off or damaged"),
}


@pytest.mark.parametrize(("pickled", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_is_one_clear_error(
    pickled: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the reader, and through the command line as the file of a rank."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "global_step1"
    folder.mkdir()
    for path in (tmp_path / "x.pt", folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x04" + pickled)
            archive.writestr("archive/data/0", bytes(40))
    with pytest.raises(DamagedError, match=rf"x\.pt: .*{expected}" if expected != "x.pt" else expected):
        load_state(tmp_path / "x.pt")
    assert main(["checkpoints", "consolidate", str(folder), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "rank_0_mp_rank_00_optim_states.pt" in line and len(line) < 600
    assert not (tmp_path / "called").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "member",
    [
        ZERO_STAGE + b"K\x03\x85R",  # as most Pythons pickle an Enum's member
        b"c__builtin__\ngetattr\n(" + ZERO_STAGE + text("weights") + b"tR",  # as 3.11.2 does, Debian bookworm's
    ],
)
def test_the_stage_of_zero_is_read_as_any_python_wrote_it(tmp_path: Path, member: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + text("zero_stage") + member + b"s.")
    assert load_state(tmp_path / "x.pt")[0] == {"zero_stage": 3}


def test_objects_of_unknown_classes_are_left_empty(tmp_path: Path) -> None:
    state = {
        "settings": Settings(depth=3),
        "made": datetime.datetime(2026, 1, 2),
        "path": pathlib.PurePosixPath("/a"),
        "counts": collections.defaultdict(int, {"a": 1}),
        "names": {"a", "b"},
        "array": torch.arange(3).numpy(),
        "device": torch.device("cpu"),
        "kept": collections.OrderedDict(a=torch.Size((2, 3))),
    }
    torch.save(state, tmp_path / "x.pt")
    loaded, _ = load_state(tmp_path / "x.pt")
    assert list(loaded) == list(state)
    assert loaded["kept"] == {"a": (2, 3)}
    assert not hasattr(loaded["settings"], "depth")


@pytest.mark.parametrize("alignment", [None, 4096])
def test_a_tensor_lies_where_it_is_said_to_lie(tmp_path: Path, alignment: int | None) -> None:
    whole = torch.arange(24, dtype=torch.int16)
    tensors = {"whole": whole, "part": whole[5:11], "single": whole[7], "empty": whole[:0], "flag": whole > 3}
    tensors["parameter"] = torch.nn.Parameter(torch.rand(3, 2).bfloat16())
    tensors["wide"] = torch.arange(4).to(torch.uint16)
    torch.save(tensors, tmp_path / "x.pt")
    if alignment:
        restored_with_other_extra_field(tmp_path / "x.pt", alignment)
    data = (tmp_path / "x.pt").read_bytes()
    for name, stored in load_state(tmp_path / "x.pt")[0].items():
        assert isinstance(stored, StoredTensor)
        expected = tensors[name].detach().contiguous()
        found = data[stored.segment(0, 0).offset_bytes :][: expected.nbytes]
        assert found == expected.reshape(-1).view(torch.uint8).numpy().tobytes() if expected.numel() else not found
        assert (stored.shape, f"torch.{stored.dtype}") == (tuple(expected.shape), str(expected.dtype))


def restored_with_other_extra_field(path: Path, alignment: int) -> None:
    """Write the archive again, its local headers padded in another way than torch does."""
    with zipfile.ZipFile(path) as old:
        records = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in records:
            info = zipfile.ZipInfo(name)
            info.extra = b"\xff\xff" + (alignment - 4).to_bytes(2, "little") + b"\0" * (alignment - 4)
            new.writestr(info, data)


def test_a_strided_view_is_refused_only_when_it_is_needed(tmp_path: Path) -> None:
    torch.save({"turned": torch.rand(3, 4).T, "row": torch.rand(5).expand(1, 5)}, tmp_path / "x.pt")
    loaded, _ = load_state(tmp_path / "x.pt")
    assert isinstance(turned := loaded["turned"], StoredTensor) and isinstance(row := loaded["row"], StoredTensor)
    assert row.segment(0, 5).num_elements == 5
    with pytest.raises(UsageError, match="strided view"):
        turned.segment(0, 12)


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2, 50)}, tmp_path / "x.pt")
    rewrite_pickle(tmp_path / "x.pt", lambda pickled: pickled.replace(b"K\x02K2\x86", b"K\x02K3\x86"))
    with pytest.raises(DamagedError, match="reaches past its storage"):
        load_state(tmp_path / "x.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(100)}, tmp_path / "x.pt")
    rewrite_pickle(tmp_path / "x.pt", lambda pickled: pickled, compression=zipfile.ZIP_DEFLATED)
    stored = load_state(tmp_path / "x.pt")[0]["x"]
    assert isinstance(stored, StoredTensor)
    with pytest.raises(DamagedError, match="not stored plainly"):
        stored.segment(0, 1)


def rewrite_pickle(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        records = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records:
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip at all" * 9])
def test_what_is_no_archive_is_called_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DamagedError, match="x.pt"):
        load_state(tmp_path / "x.pt")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="x.pt: no such file"):
        load_state(tmp_path / "x.pt")
