"""Where a database may lie, and whose fault an error of SQLite is."""

from __future__ import annotations

import pathlib
import sqlite3

NETWORK = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "wekafs", "fuse.sshfs", "fuse.gcsfuse",
)  # fmt: skip
# What SQLite says where the file is not at fault.
OF_THE_DISK = ("unable to open", "readonly", "locked", "disk i/o error", "is full", "busy")


def of_the_disk(error: BaseException) -> bool:
    """Whether SQLite failed for what the disk, the folder or another writer does, not for what is in the file."""
    return isinstance(error, sqlite3.OperationalError) and any(words in str(error).lower() for words in OF_THE_DISK)


def file_system(path: pathlib.Path) -> str:
    """Type of the file system a path is on, as the kernel names it; empty where it does not say."""
    try:
        mounts = [line.split() for line in pathlib.Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    around = [fields for fields in mounts if path.resolve().is_relative_to(fields[1])]
    return max(around, key=lambda fields: len(fields[1]))[2] if around else ""


def refuse_network(path: pathlib.Path) -> None:
    """OSError where the file would be on a network file system."""
    kind = file_system(path)
    if kind in NETWORK:
        raise OSError(
            f"{path} is on a network file system ({kind}), where SQLite's locks do not hold: keep a database on each machine's "
            "disk (SBKERNELS_TUNING_DB) and put them together with `sbk db merge`"
        )
