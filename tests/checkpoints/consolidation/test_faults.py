"""A consolidation that is stopped anywhere leaves no half model, and the next one ends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sousbatch
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.errors import DamagedError, IncompleteError

Copied = Callable[[str], Path]
HARNESS = Path(__file__).with_name("kill_everywhere.py")


@pytest.mark.parametrize(("how", "least"), [("kill", 200), ("full", 100)])
def test_wherever_it_is_stopped_nothing_half_appears_and_the_next_one_ends_it(
    how: str, least: int, cases: Path, memory_dir: Path
) -> None:
    """Before and after every call that changes the disk, from a fresh start and while going on."""
    done = subprocess.run(
        [sys.executable, "-P", str(HARNESS), how, str(cases / "z3_bf16" / "ck"), str(memory_dir)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(sousbatch.__path__[0]).parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == [], done.stderr[-3000:]
    assert report["hit"] >= least


def test_a_disk_of_any_size_that_is_too_small_says_so_and_a_larger_one_goes_on(
    cases: Path, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A tmpfs from one page up to what is enough, page by page, grown under the same consolidation."""
    mount = f"mount -t tmpfs -o size=4k none '{tmp_path}' &&"
    if subprocess.run(["unshare", "-m", "sh", "-c", f"{mount} true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    code = (
        "import subprocess; from pathlib import Path; from sousbatch.checkpoints.formats import detect\n"
        "from sousbatch.checkpoints.consolidation import consolidate\n"
        "from sousbatch.errors import NoRoomError\n"
        f"home, refused = Path({str(tmp_path)!r}), 0\n"
        f"source = detect.open_source(Path({str(cases / 'z3_bf16' / 'ck')!r}))\n"
        "for pages in range(1, 60):\n"
        "    subprocess.run(['mount', '-o', f'remount,size={4 * pages}k', home], check=True)\n"
        "    try:\n"
        "        consolidate.consolidate(source, home / 'out', consolidate.ConsolidateOptions(max_shard_bytes=4000))\n"
        "        break\n"
        "    except NoRoomError:\n"
        "        refused += 1\n"
        "        assert not (home / 'out').exists()\n"
        "from sousbatch.checkpoints.consolidation.manifest import verify_manifest\n"
        "verify_manifest(home / 'out')\n"
        "print(refused, [path.name for path in home.iterdir()])"
    )
    done = run_python(code, prefix=mount, wrap=("unshare", "-m"))
    assert done.returncode == 0, done.stderr
    refused, _, left = done.stdout.strip().partition(" ")
    assert int(refused) > 5 and left == "['out']"


@pytest.mark.parametrize("num_bytes", [0, 1, 500, -1])
@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_cut_off_rank_file_is_named(kind: str, num_bytes: int, copied: Copied, tmp_path: Path) -> None:
    path = next(copied("z3_bf16").glob(f"global_step1/*_0_mp_rank_00_{kind}_states.pt"))
    os.truncate(path, path.stat().st_size + num_bytes if num_bytes < 0 else num_bytes)
    with pytest.raises(DamagedError, match=path.name):
        consolidate(open_source(path.parent.parent), tmp_path / "out")


@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_missing_rank_file_is_named(kind: str, copied: Copied) -> None:
    path = next(copied("z3_bf16").glob(f"global_step1/*_1_mp_rank_00_{kind}_states.pt"))
    path.unlink()
    with pytest.raises(IncompleteError, match=f"{kind}_states of rank 1 of 2 missing"):
        open_source(path.parent.parent)


def test_a_file_that_becomes_shorter_or_goes_while_it_is_read_is_named(copied: Copied, tmp_path: Path) -> None:
    path = copied("z3_bf16")
    source = open_source(path)
    file = next(path.glob("global_step1/*_1_mp_rank_00_optim_states.pt"))
    os.truncate(file, 100)
    with pytest.raises(DamagedError, match=f"{file.name}: became shorter"):
        consolidate(source, tmp_path / "out")
    file.unlink()
    with pytest.raises(DamagedError, match=f"{file.name}: was removed"):
        consolidate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp", "a/../../b", ".."])
def test_a_latest_that_leads_out_of_the_checkpoint_is_refused(tag: str, copied: Copied, tmp_path: Path) -> None:
    path = copied("z3_bf16")
    shutil.copytree(path / "global_step1", tmp_path / "elsewhere")
    (path / "latest").write_text(tag)
    with pytest.raises(DamagedError, match="does not lie in it; that file was not opened"):
        open_source(path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_file({"secret": torch.ones(2)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"secret": "../secret.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedError, match="'../secret.safetensors', which does not lie in it"):
        open_source(tmp_path / "model")


def test_checkpoints_of_links_convert_and_an_output_that_is_a_link_is_not_followed(cases: Path, tmp_path: Path) -> None:
    """Hub caches are folders of links; a link in the place of an output may lead anywhere."""
    linked = tmp_path / "ck" / "global_step1"
    linked.mkdir(parents=True)
    for file in (cases / "z3_bf16" / "ck" / "global_step1").iterdir():
        (linked / file.name).symlink_to(file)
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".tmp-out.part").mkdir()
    (tmp_path / ".tmp-out.part" / ".tmp-model.safetensors").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        consolidate(open_source(tmp_path / "ck"), tmp_path / "out")
    consolidate(open_source(tmp_path / "ck"), tmp_path / "out")
    assert (tmp_path / "target").read_text() == "precious"
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\nb", "ä 'quote\" \\", "x" * 2000])
def test_names_of_parameters_are_only_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({name: torch.arange(3.0)}, tmp_path / "model" / "model.safetensors")
    consolidate(open_source(tmp_path / "model"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[name].tolist() == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
