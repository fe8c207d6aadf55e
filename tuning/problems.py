"""What is tuned: sets of problems by name, and problems as a command line gives them. Both directions of each."""

from __future__ import annotations

import re

from ..problem import DTYPES, MAX_HEAD_DIM, Problem

FIELD = re.compile(r"(\d+)(?:/(\d+))?")
SHAPE = "B,H,N,D, with H/Hk for grouped heads, M/N for fewer queries than keys, D/Dv for two head dims"


def training(device: str) -> list[Problem]:
    """Layers of language models in bfloat16: D of 64 and 128, N from 1k to 32k, 16k tokens or one sequence."""
    lengths = [2**n for n in range(10, 16)]
    shapes = [(max(1, 2**14 // N), 2048 // D, N, D) for D in (64, 128) for N in lengths]
    return [made(B, H, H, N, N, D, D, "bfloat16", device) for B, H, N, D in shapes]


def small(device: str) -> list[Problem]:
    """Three that a CPU tunes in minutes, in float32."""
    return [made(1, 8, 8, N, N, 64, 64, "float32", device) for N in (256, 512, 1024)]


SETS = {"training": training, "small": small}


def made(B: int, H: int, Hk: int, M: int, N: int, D: int, Dv: int, dtype: str, device: str, **flags) -> Problem:
    """A dense forward problem whose rows are aligned where their widths allow it."""
    aligned = all(width * DTYPES[dtype].itemsize % 16 == 0 for width in (D, Dv))
    return Problem(B, H, Hk, M, N, D, Dv, dtype, device, aligned=aligned, **flags)


def parse(text: str, dtype: str, device: str, **flags) -> Problem:
    """The forward problem of a SHAPE. ValueError for what is none."""
    fields = [FIELD.fullmatch(part.strip()) for part in text.split(",")]
    if len(fields) != 4 or None in fields:
        raise ValueError(f"--shape {text!r}: expected {SHAPE}")
    (B, more), (H, Hk), (M, N), (D, Dv) = [(int(a), int(b) if b else int(a)) for a, b in (field.groups() for field in fields)]
    if more != B or min(B, H, Hk, M, D, Dv) < 1 or H % Hk or M > N or max(D, Dv) > MAX_HEAD_DIM:
        raise ValueError(f"--shape {text!r}: expected {SHAPE}; all positive, Hk a divisor of H, M <= N, D and Dv <= {MAX_HEAD_DIM}")
    return made(B, H, Hk, M, N, D, Dv, dtype, device, **flags)
