"""What a store can take: real file systems where this machine can make them, documented output elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sousbatch.checkpoints.capacity import allocation, limits
from sousbatch.checkpoints.capacity.limits import Limit, Mount

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:26 / /home rw - nfs4 server:/home rw
31 22 0:27 / /home/my\\040project rw shared:7 - lustre mds@o2ib:/scratch rw
32 22 0:28 / /home/my rw - xfs /dev/sdb rw
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/tmp/x", ("/", "ext4")),
        ("/home/me", ("/home", "nfs4")),
        ("/home/my project/runs", ("/home/my project", "lustre")),
        ("/home/my", ("/home/my", "xfs")),
        ("/home/mything", ("/home", "nfs4")),
    ],
)
def test_the_mount_of_a_folder_is_the_longest_that_holds_it(folder: str, expected: tuple[str, str]) -> None:
    assert limits.mount_of(Path(folder), MOUNTS) == Mount(point=expected[0], kind=expected[1])


def command(folder: Path, name: str, output: str, code: int = 0) -> None:
    """Put a command on the path that prints *output* and keeps its arguments."""
    (folder / f"{name}.txt").write_text(output)
    (folder / name).write_text(
        f'#!/bin/sh\necho "$@" >> "{folder}/{name}.arguments"\ncat "{folder}/{name}.txt"\nexit {code}\n'
    )
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


QUOTAS = {
    "soft and hard": ("/dev/sda1  400 1000 2000 0 10 0 0 0", 600 * 1024, None),
    "hard alone": ("/dev/sda1  400 0 2000 0 10 0 100 0", 1600 * 1024, 90),
    "over the soft limit, in its days of grace": ("server:/home  1500* 1000 2000 1700000000 10* 5 8 1700000000", 0, 0),
    "files alone": ("/dev/sda1  400 0 0 0 10 20 30 0", None, 10),
}


@pytest.mark.parametrize(("line", "num_bytes", "num_files"), QUOTAS.values(), ids=QUOTAS)
def test_the_output_of_quota_is_understood(commands: Path, line: str, num_bytes: int, num_files: int) -> None:
    """The columns of quota(1) with --raw-grace, where a grace always has a number."""
    head = (
        "Disk quotas for user me (uid 7): \n     Filesystem  blocks   quota   limit   grace   files   quota   limit\n"
    )
    command(commands, "quota", head + line + "\n", code=1)
    user, group = limits.user_quota(Mount(point="/home/my project", kind="nfs4"))
    assert user == Limit(source="user quota", num_bytes=num_bytes, num_files=num_files)
    assert (group.source, group.num_bytes) == ("group quota", num_bytes)
    assert "-u --filesystem=/home/my project" in (commands / "quota.arguments").read_text()


@pytest.mark.parametrize(
    "output", ["", "Disk quotas for user me (uid 7): none\n", "/dev/sda1 400 0 0 0 10 0 0 0\n", "x y\n"]
)
def test_no_quota_is_no_limit(commands: Path, output: str) -> None:
    command(commands, "quota", output)
    assert list(limits.user_quota(Mount(point="/", kind="ext4"))) == []


def test_the_output_of_lfs_quota_is_understood(commands: Path) -> None:
    command(commands, "lfs", "     /scratch    400*      0    1000       -      10       0       0       -\n")
    found = list(limits.lustre_quota(Mount(point="/scratch", kind="lustre")))
    assert [(one.source, one.num_bytes) for one in found] == [("user quota", 600 * 1024), ("group quota", 600 * 1024)]


def test_the_output_of_beegfs_ctl_is_understood(commands: Path) -> None:
    rows = f"name,id,size,hard,files,hard\nme,{os.getuid()},400,1000,3,unlimited\n"
    command(commands, "beegfs-ctl", rows)
    assert list(limits.beegfs_quota(Mount(point="/mnt", kind="beegfs")))[0] == Limit(
        source="user quota", num_bytes=600, num_files=None
    )


def test_every_folder_above_may_have_a_quota_on_cephfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        (tmp_path, "ceph.quota.max_bytes"): b"1000",
        (tmp_path, "ceph.dir.rbytes"): b"400",
        (tmp_path.parent, "ceph.quota.max_files"): b"50",
        (tmp_path.parent, "ceph.dir.rentries"): b"20",
    }

    def attribute(path: Path, name: str) -> bytes:
        if (path, name) not in values:
            raise OSError(61, "No data available")
        return values[path, name]

    monkeypatch.setattr(os, "getxattr", attribute)
    found = [(one.num_bytes, one.num_files) for one in limits.ceph_quota(tmp_path)]
    assert found == [(600, None), (None, 30)]


def test_a_command_that_is_missing_or_hangs_is_no_limit(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = Mount(point="/", kind="ext4")
    monkeypatch.setattr(limits, "_TIMEOUT_S", 0.2)
    (commands / "quota").write_text("#!/bin/sh\nexec sleep 5\n")
    (commands / "quota").chmod(0o755)
    assert list(limits.user_quota(mount)) == []
    monkeypatch.setenv("PATH", str(commands / "nothing"))
    assert [*limits.user_quota(mount), *limits.lustre_quota(mount), *limits.beegfs_quota(mount)] == []


def test_the_tightest_limit_counts() -> None:
    found = limits.tightest(
        [
            Limit(source="free space", num_bytes=900, num_files=None),
            Limit(source="user quota", num_bytes=300, num_files=70),
            Limit(source="group quota", num_bytes=None, num_files=20),
        ]
    )
    assert found == Limit(source="user quota", num_bytes=300, num_files=20)


def test_a_folder_that_is_not_there_yet_is_asked_above(tmp_path: Path) -> None:
    (first, *_) = limits.read_limits(tmp_path / "a" / "b")
    assert first.source == "free space" and first.num_bytes is not None


def run(*words: object) -> bool:
    return subprocess.run([str(word) for word in words], capture_output=True).returncode == 0


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "store"
    point.mkdir()
    yield point
    run("umount", "-l", point)


FILE_SYSTEMS = {
    "tmpfs": ("mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=100", "tmpfs"),
    "ext4": ("mkfs.ext4", "-q"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}


def make_store(kind: str, point: Path, image_mb: int = 320) -> None:
    """Mount a file system of its own at *point*, or skip."""
    if os.geteuid() or shutil.which(FILE_SYSTEMS[kind][0]) is None:
        pytest.skip("needs root and the tools of the file system")
    image = point.parent / "image"
    if kind != "tmpfs":
        with image.open("wb") as stream:
            stream.truncate(image_mb << 20)
        if not run(*FILE_SYSTEMS[kind], image) or not run("mount", "-o", "loop", image, point):
            pytest.skip(f"this machine cannot mount {kind}")
    elif not run(*FILE_SYSTEMS[kind], point):
        pytest.skip("this machine cannot mount tmpfs")


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_free_space_is_what_can_be_taken_on_a_real_file_system(kind: str, mounted: Path) -> None:
    make_store(kind, mounted)
    limit = limits.tightest(limits.read_limits(mounted))
    assert limit.num_bytes is not None and (limit.num_files is None) == (kind == "btrfs")
    assert allocation.probe_free_bytes(mounted, limit.num_bytes // 2) == limit.num_bytes // 2
    assert allocation.probe_free_bytes(mounted, 2 * limit.num_bytes) == pytest.approx(limit.num_bytes, rel=0.2)
    assert list(mounted.glob(".tmp-*")) == []


@pytest.fixture
def quota_of_20_mib(mounted: Path) -> Path:
    """A real quota that statvfs does not show: writing above it is EDQUOT."""
    make_store("btrfs", mounted)
    store = mounted / "mine"
    steps = [("quota", "enable", mounted), ("subvolume", "create", store), ("qgroup", "limit", "20M", store)]
    if not all(run("btrfs", *step) for step in steps):
        pytest.skip("this machine cannot make a btrfs quota")
    return store


def test_a_quota_that_no_figure_shows_is_found_by_the_probe(quota_of_20_mib: Path) -> None:
    limit = limits.tightest(limits.read_limits(quota_of_20_mib))
    assert limit.num_bytes is not None and limit.num_bytes > 100 << 20, "statvfs shows the file system"
    assert allocation.probe_free_bytes(quota_of_20_mib, 10 << 20) == 10 << 20
    assert 16 << 20 < allocation.probe_free_bytes(quota_of_20_mib, 40 << 20) <= 20 << 20


def test_the_reserve_is_really_allocated_and_comes_back(mounted: Path) -> None:
    make_store("tmpfs", mounted)
    free = os.statvfs(mounted).f_bavail * 4096
    allocation.keep_reserve(mounted, 4 << 20)
    allocation.keep_reserve(mounted, 4 << 20)
    assert os.statvfs(mounted).f_bavail * 4096 == free - (4 << 20)
    assert allocation.measure_usage(mounted) >= 4 << 20
    allocation.keep_reserve(mounted, 0)
    assert os.statvfs(mounted).f_bavail * 4096 == free
    with pytest.raises(OSError, match="No space"):
        allocation.keep_reserve(mounted, 9 << 20)
    assert os.statvfs(mounted).f_bavail * 4096 == free
