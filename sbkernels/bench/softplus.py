"""Errors and throughput of each variant of softplus2(s) = log2(1 + 2^s) and of 1 - beta = 1 / (1 + 2^s) in csrc/math.cuh.

Errors are those of float32 results against float64: on a GPU over all 2^32 inputs, on a CPU, where the mathematical library
stands in for the approximate instructions, over `samples`. Throughput is a GPU's: one block of one multiprocessor, from registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

GPU_CHUNK = 2**26  # inputs a launch: some milliseconds, between which an interrupt is heard
CPU_CHUNK = 2**18
MANTISSAS = 2**12  # of each sign and exponent
GRID, GRID_LIMIT = 2**21, 40.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant. Inputs are base-2 logits; _at: the one with that error, and of several the one with the smallest bits.

    special: special functions per logit. ulps_uncut: of inputs that no variant cuts; ulps: of all inputs; both over results
    of at least 2^-125. lost_nans: NaNs that gave a number. logits_per_clock: per multiprocessor; None on a CPU.
    """

    variant: str
    special: float
    ulps_uncut: float
    ulps_uncut_at: float
    ulps: float
    ulps_at: float
    absolute: float
    absolute_at: float
    lost_nans: int
    logits_per_clock: float | None


def extension():
    """The module sbkernels._C.math. RuntimeError saying how to get it where it is missing."""
    try:
        from .._C import math
    except ImportError as error:
        build = "`pip install -c constraints.txt -e '.[all]'` builds the extension where nvcc is installed"
        raise RuntimeError(f"{error}: {build}") from error
    return math


def samples() -> np.ndarray:
    """float32 [2^22]: for both signs and all exponents evenly spread mantissas, NaN and inf among them, and a dense grid."""
    high = np.arange(2**9, dtype=np.uint32) << 23
    mantissas = np.linspace(0, 2**23 - 1, MANTISSAS).astype(np.uint32)
    grid = np.linspace(-GRID_LIMIT, GRID_LIMIT, GRID, dtype=np.float32)
    return np.concatenate([(high[:, None] | mantissas).ravel().view(np.float32), grid])


def steps(device: str) -> int:
    """How often `run` calls progress."""
    chunks = 2**32 // GPU_CHUNK if device.startswith("cuda") else len(samples()) // CPU_CHUNK
    return chunks * len(extension().variants())


def run(device: str, rows: list[Row], progress: Callable[[str], None]) -> None:
    """Add a row for each variant, as measured on device; progress(variant) after each chunk of inputs."""
    math = extension()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        index, stream = torch.device(device).index, torch.cuda.current_stream(device).cuda_stream
        chunks = range(0, 2**32, GPU_CHUNK)
    else:
        chunks = np.split(samples(), len(samples()) // CPU_CHUNK)
    for variant, special, _ in math.variants():
        errors = math.Errors()
        for chunk in chunks:
            if on_gpu:
                errors.take(math.errors_on_gpu(variant, chunk, GPU_CHUNK, index, stream))
            else:
                errors.take(math.errors_on_cpu(variant, chunk))
            progress(variant)
        found = {field.name: getattr(errors, field.name) for field in dataclasses.fields(Row) if hasattr(errors, field.name)}
        speed = math.throughput_on_gpu(variant, index, stream) if on_gpu else None
        rows.append(Row(variant, special, **found, logits_per_clock=speed))
