"""Every SBKERNELS_* environment variable but those of the build (csrc/build_cuda.py): parsed here alone, strictly, at each use."""

from __future__ import annotations

import os
import pathlib

BACKEND = "SBKERNELS_BACKEND"
WORKSPACE = "SBKERNELS_WORKSPACE"
CHECK_SEQLENS = "SBKERNELS_CHECK_SEQLENS"
CACHE = "SBKERNELS_CACHE"
TUNING_DB = "SBKERNELS_TUNING_DB"
AUTOTUNE = "SBKERNELS_AUTOTUNE"
NVTX = "SBKERNELS_NVTX"

DEFAULT_WORKSPACE = 256 * 2**20
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# name -> (what it does, default in words); the README's table and `sbk info` print this.
VARIABLES = {
    BACKEND: ("backend of calls that name none: a registered name, or auto", "auto"),
    WORKSPACE: ("most bytes a backward may take for scratch, such as 268435456, 256MiB or 1GiB", "256MiB"),
    CHECK_SEQLENS: ("1: read cu_seqlens back and check it in each varlen call; 0: trust it (CUDA graph capture)", "1"),
    AUTOTUNE: ("1: tune for the first problem of its kind that no tuned config serves; takes up to a minute a pass", "0"),
    TUNING_DB: ("file of the tuning database", "tuning.db in the folder of SBKERNELS_CACHE"),
    NVTX: ("1: each pass on a GPU is an NVTX range; read when a kind of call is first made", "0"),
    CACHE: ("folder of the kernels compiled at run time", "$XDG_CACHE_HOME/sbkernels or ~/.cache/sbkernels"),
}


def backend() -> str | None:
    """The backend SBKERNELS_BACKEND names; None for unset, empty or auto."""
    value = os.environ.get(BACKEND, "").strip()
    return None if value in ("", "auto") else value


def workspace() -> int:
    """Bytes a backward may take for scratch. ValueError if SBKERNELS_WORKSPACE is not a size."""
    value = os.environ.get(WORKSPACE, "").strip()
    if not value:
        return DEFAULT_WORKSPACE
    digits = value.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = value[len(digits) :].strip().upper()
    if not digits.isdigit() or int(digits) == 0 or unit not in _UNITS:
        raise ValueError(f"{WORKSPACE}={value!r} is not a size: expected a positive number of bytes, KiB, MiB or GiB")
    return int(digits) * _UNITS[unit]


def check_seqlens() -> bool:
    """Whether varlen calls read cu_seqlens back to the host and check it."""
    return _flag(CHECK_SEQLENS, "1")


def autotune() -> bool:
    """Whether what no tuned config serves is tuned when it first comes."""
    return _flag(AUTOTUNE, "0")


def nvtx() -> bool:
    """Whether passes are NVTX ranges."""
    return _flag(NVTX, "0")


def _flag(name: str, default: str) -> bool:
    value = os.environ.get(name, "").strip() or default
    if value not in ("0", "1"):
        raise ValueError(f"{name}={value!r} is neither 0 nor 1")
    return value == "1"


def tuning_database() -> pathlib.Path:
    """File of the tuning database; it need not exist."""
    value = os.environ.get(TUNING_DB, "").strip()
    return pathlib.Path(value).expanduser().absolute() if value else cache_folder() / "tuning.db"


def cache_folder() -> pathlib.Path:
    """Folder of the kernels compiled at run time; it need not exist yet."""
    value = os.environ.get(CACHE, "").strip()
    if value:
        return pathlib.Path(value).expanduser().absolute()
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else pathlib.Path.home() / ".cache") / "sbkernels"
