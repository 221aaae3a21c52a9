"""Checkpoints by hand and of real DeepSpeed runs, what tests do to them, and a place where syncs are cheap."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sousbatch.checkpoints.formats.tensors import DTYPES, Source

if TYPE_CHECKING:
    import torch

_GENERATOR = Path(__file__).with_name("generate_checkpoints.py")


@pytest.fixture
def memory_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs cost nothing there."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def write_zero3() -> Callable[..., Path]:
    """Write a ZeRO-3 checkpoint as DeepSpeed does, of any number of ranks, and what it must convert to."""

    def write(path: Path, *, shapes: Mapping[str, tuple[int, ...]], world_size: int) -> Path:
        import torch

        tag = path / "global_step1"
        tag.mkdir(parents=True)
        (path / "latest").write_text("global_step1")
        torch.manual_seed(0)
        weights = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
        parts: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
        for tensor in weights.values():
            size = -(-tensor.numel() // world_size)
            padded = torch.nn.functional.pad(tensor.flatten(), (0, size * world_size - tensor.numel()))
            for rank in range(world_size):
                parts[rank].append(padded[rank * size : (rank + 1) * size])
        model = {
            "module": {name: torch.empty(0) for name in shapes},
            "buffer_names": [],
            "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
            "frozen_param_fragments": {},
            "shared_params": {},
            "global_steps": 1,
            "ds_version": "0.19.8",
        }
        for rank, pieces in enumerate(parts):
            flat = torch.cat(pieces)
            moments = {"step": torch.tensor(1.0), "exp_avg": flat * 0.1, "exp_avg_sq": flat**2}
            inner = {
                "zero_stage": 3,
                "partition_count": world_size,
                "optimizer_state_dict": {"state": {0: moments}, "param_groups": []},
                "fp32_flat_groups": [flat],
            }
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            torch.save({"optimizer_state_dict": inner, "ds_config": {}}, tag / f"{name}_optim_states.pt")
            torch.save(model, tag / f"{name}_model_states.pt")
        torch.save(weights, path / "expected.pt")
        return path

    return write


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all generated cases; see generate_checkpoints.py for what each holds."""
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp("zero") / "cases"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(_GENERATOR), str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return root


@pytest.fixture
def copied(cases: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a case's checkpoint, for a test that damages it."""

    def copy(case: str) -> Path:
        return Path(shutil.copytree(cases / case / "ck", tmp_path / "ck"))

    return copy


@pytest.fixture
def poke() -> Callable[[Source, str, int, bytes], None]:
    """Overwrite one element of a parameter, in the rank file that holds it, as if the training had saved that."""

    def overwrite(source: Source, name: str, index: int, value: bytes) -> None:
        tensor = next(tensor for tensor in source.tensors if tensor.name == name)
        assert len(value) == DTYPES[tensor.dtype].num_bytes
        segment = tensor.segments[0]
        with segment.path.open("r+b") as stream:
            stream.seek(segment.offset_bytes + index * len(value))
            stream.write(value)
        with_right_checksums(segment.path)

    return overwrite


def with_right_checksums(path: Path) -> None:
    """Put the CRC of what each record holds now into the zip directory."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.start_dir
        for info in archive.infolist():
            begin = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
            struct.pack_into("<I", data, entry + 16, zlib.crc32(data[begin : begin + info.file_size]))
            entry += 46 + sum(struct.unpack_from("<HHH", data, entry + 28))
    path.write_bytes(data)


@pytest.fixture
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Load all tensors of a model or adapter folder."""

    def load(folder: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        files = sorted(folder.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    return load


@pytest.fixture
def oracle(cases: Path) -> Callable[[str, str], dict[str, torch.Tensor]]:
    """Load what a case must convert to: by `deepspeed` (its converter) or `live` (the running engine)."""

    def load(case: str, by: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        tensors = load_file(cases / case / f"{by}.safetensors")
        return {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}

    return load


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., Path]:
    """Write a small Hugging Face folder of given tensors."""

    def write(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Path:
        from safetensors.torch import save_file

        folder = tmp_path / "model"
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a process of its own, with this package importable; *prefix* is shell before it."""

    def run(code: str, *, prefix: str = "", wrap: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        import sousbatch

        home = str(Path(sousbatch.__path__[0]).parent)
        command = [*wrap, "sh", "-c", f'{prefix} exec "$0" -c "$1"', sys.executable, code]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH")))),
        }
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)

    return run
