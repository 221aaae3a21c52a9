"""Limits of a file system: the bytes and files that it can still take.

That is free space, and every quota that can be asked; there is one function for each. `statvfs` shows a file system, on
most of them not a user's quota. What no command shows, a probe does (`allocation.probe_free_bytes`). The docstring of
each function says whether it was tried against a real quota.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 10
_UNLIMITED = 1 << 60  # the sizes that file systems give for "no limit" lie above
_FS_IOC_FSGETXATTR = 0x801C581F


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Bytes and files that one source of figures still allows.

    None is unknown or unlimited.
    """

    source: str
    num_bytes: int | None
    num_files: int | None = None


@dataclass(frozen=True, kw_only=True)
class Mount:
    """The file system that holds a folder."""

    point: str
    kind: str


def read_limits(folder: Path) -> tuple[Limit, ...]:
    """Return what each source says of the file system that holds *folder*.

    The folder need not exist yet.
    """
    folder = nearest_existing(folder)
    mount = mount_of(folder, _read("/proc/self/mountinfo"))
    found = [free_space(folder)]
    if mount.kind == "lustre":
        found += lustre_quota(mount)
    elif mount.kind in ("ceph", "fuse.ceph-fuse"):
        found += ceph_quota(folder)
    elif mount.kind in ("beegfs", "beegfs_nodev"):
        found += beegfs_quota(mount)
    elif mount.kind not in ("tmpfs", "overlay"):
        found += [*user_quota(mount), *project_quota(folder, mount)]
    return tuple(found)


def tightest(limits: Sequence[Limit]) -> Limit:
    """Return the tightest bytes with their source, and the fewest files of any."""
    known = [limit for limit in limits if limit.num_bytes is not None]
    tightest = min(known, key=lambda limit: limit.num_bytes or 0)
    files = [limit.num_files for limit in limits if limit.num_files is not None]
    return Limit(source=tightest.source, num_bytes=tightest.num_bytes, num_files=min(files, default=None))


def nearest_existing(folder: Path) -> Path:
    """Return *folder*, or the nearest folder above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder.resolve()


def mount_of(folder: Path, mountinfo: str) -> Mount:
    """Return the mount that *folder* lies on.

    It is found in the text of /proc/self/mountinfo; the last one counts.
    """
    found = Mount(point="/", kind="")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")  # a space is written \\040
        is_longer = len(Path(point).parts) >= len(Path(found.point).parts)
        if folder.is_relative_to(point) and is_longer:
            found = Mount(point=point, kind=right.split()[0])
    return found


def free_space(folder: Path) -> Limit:
    """Return what the file system can take. Tested: ext4, XFS, btrfs, tmpfs.

    A project quota of XFS or ext4 is in these figures already where the folder passes its project
    on (the kernel's xfs_qm_statvfs and ext4_statfs_project): from documentation, untested.
    """
    room = os.statvfs(folder)
    files = room.f_favail if room.f_files else None  # btrfs counts none
    return Limit(source="free space", num_bytes=room.f_bavail * room.f_frsize, num_files=files)


def user_quota(mount: Mount) -> Iterator[Limit]:
    """Yield the quota of this user and group as `quota` reports it, over NFS too.

    From documentation, untested against a real quota: it needs a kernel with CONFIG_QFMT_V2 or
    CONFIG_XFS_QUOTA. The command itself was run where there is none.
    """
    for whose, option in (("user quota", "-u"), ("group quota", "-g")):
        yield from _kilobytes(whose, ["quota", "-w", "-p", option, f"--filesystem={mount.point}"])


def project_quota(folder: Path, mount: Mount) -> Iterator[Limit]:
    """Yield the quota of the project that *folder* belongs to.

    This is from documentation, untested, as `user_quota`.
    """
    project = project_of(folder)
    if project:
        yield from _kilobytes("project quota", ["quota", "-w", "-p", "-P", f"--filesystem={mount.point}", str(project)])


def project_of(folder: Path) -> int:
    """Return the project number of *folder*.

    0 is none, or a file system without projects.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return 0
    try:  # struct fsxattr: flags, extent size, extents, project, ...
        return int(struct.unpack("4I12x", fcntl.ioctl(descriptor, _FS_IOC_FSGETXATTR, bytes(28)))[3])
    except OSError:
        return 0
    finally:
        os.close(descriptor)


def lustre_quota(mount: Mount) -> Iterator[Limit]:
    """Yield the quota of this user and group as `lfs quota` reports it.

    This is from documentation, untested.
    """
    for whose, option, number in (("user quota", "-u", os.getuid()), ("group quota", "-g", os.getgid())):
        yield from _kilobytes(whose, ["lfs", "quota", "-q", option, str(number), mount.point])


def _kilobytes(source: str, command: Sequence[str]) -> Iterator[Limit]:
    """Yield the limit in the output of `quota -w -p` and `lfs quota -q`.

    Both have the same columns. A file system, then used, soft and hard limit and grace of 1 KiB blocks, and the same of
    files.
    """
    for line in _run(command).splitlines():
        numbers = [word.rstrip("*") for word in line.split()[1:]]
        if len(numbers) >= 7 and all(word.isdigit() for word in (*numbers[:3], *numbers[4:7])):
            blocks, inodes = [int(word) for word in numbers[:3]], [int(word) for word in numbers[4:7]]
            num_bytes, num_files = _left(*blocks), _left(*inodes)
            if num_bytes is not None or num_files is not None:
                num_bytes = None if num_bytes is None else num_bytes * 1024
                yield Limit(source=source, num_bytes=num_bytes, num_files=num_files)


def _left(used: int, soft: int, hard: int) -> int | None:
    """Return what is left below the lower of two limits, of which 0 is none."""
    limits = [limit for limit in (soft, hard) if limit]
    return max(0, min(limits) - used) if limits else None


def ceph_quota(folder: Path) -> Iterator[Limit]:
    """Yield the quota of every folder above, from CephFS's attributes.

    This is from documentation, untested.
    """
    for place in (folder, *folder.parents):
        most, used = _attribute(place, "ceph.quota.max_bytes"), _attribute(place, "ceph.dir.rbytes")
        most_files, used_files = _attribute(place, "ceph.quota.max_files"), _attribute(place, "ceph.dir.rentries")
        if most or most_files:
            yield Limit(
                source=f"quota of {place}",
                num_bytes=max(0, most - used) if most else None,
                num_files=max(0, most_files - used_files) if most_files else None,
            )


def _attribute(path: Path, name: str) -> int:
    try:
        return int(os.getxattr(path, name).split(b".")[0])
    except (OSError, ValueError):
        return 0


def beegfs_quota(mount: Mount) -> Iterator[Limit]:
    """Yield the quota of this user and group as `beegfs-ctl` reports it.

    This is from documentation, untested.
    """
    for whose, option, number in (("user quota", "--uid", os.getuid()), ("group quota", "--gid", os.getgid())):
        command = ["beegfs-ctl", "--getquota", "--csv", f"--mount={mount.point}", option, str(number)]
        for line in _run(command).splitlines():
            cells = [cell.strip() for cell in line.split(",")]
            if len(cells) >= 6 and cells[1] == str(number):
                used, most, used_files, most_files = (int(cell) if cell.isdigit() else 0 for cell in cells[2:6])
                yield Limit(
                    source=whose,
                    num_bytes=_left(used, 0, most if most < _UNLIMITED else 0),
                    num_files=_left(used_files, 0, most_files if most_files < _UNLIMITED else 0),
                )


def _run(command: Sequence[str]) -> str:
    """Return what *command* prints.

    Return nothing where it is not installed, fails or hangs. `quota` ends with 1 when a limit is passed, and still
    prints it.
    """
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=os.environ | {"LC_ALL": "C"}
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
