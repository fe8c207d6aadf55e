"""What a measurement is kept under: machine, toolchain, kernel sources, problem; each a dict of plain values, as
config.to_dict makes of a config.

Machine and toolchain are kept apart, so that an upgrade makes rows older but does not orphan them. A problem is cut in two: what
has to match exactly, and the sizes, of which a neighbour may serve.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os

import torch

from .. import environment
from ..problem import Problem

EXACT = (
    "direction", "dtype", "head_dim", "value_dim", "group", "layout", "varlen", "attend_current", "skip", "aligned",
)  # fmt: skip


def canonical(value) -> str:
    """JSON of plain values, the same text for equal ones. TypeError for what JSON does not have, ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value) -> str:
    """16 hexadecimal digits that name a value of plain ones."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


@functools.cache
def machine(device: str) -> dict:
    """The processor that a device is.

    Of a GPU name, capability, multiprocessors, memory and L2 in bytes, power limit and MIG mode; of a CPU model and cores. Asked
    once a process, as toolchain is.
    """
    if torch.device(device).type != "cuda":
        return {"kind": "cpu", "name": environment.cpu_name(), "cores": os.cpu_count()}
    p = torch.cuda.get_device_properties(device)
    found = environment.nvidia_smi("uuid,power.limit,mig.mode.current")
    power, mig = next((line.split(", ")[1:] for line in found if line.split(", ")[0].endswith(str(p.uuid))), (None, None))
    return {
        "kind": "cuda", "name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
        "memory": p.total_memory, "l2": p.L2_cache_size, "power_limit": power, "mig": mig,
    }  # fmt: skip


@functools.cache
def toolchain(backend, device: str) -> dict:
    """Versions that a backend's kernels on a device depend on besides their sources."""
    found = environment.versions() | backend.versions()
    if torch.device(device).type == "cuda":
        driver = environment.nvidia_smi("driver_version")
        found |= {"cuda": torch.version.cuda, "driver": driver[0] if driver else None}
    return found


def kernel(backend, direction: str) -> dict:
    """A backend's kernels of one direction ("forward" or "backward"), by the hash of all their sources."""
    return {"backend": backend.name, "direction": direction, "sources": environment.source_hash(backend)}


def problem(described: Problem) -> dict:
    """A problem, whatever device it is on: "exact" has to match, "sizes" may be a neighbour's."""
    exact = {name: getattr(described, name) for name in EXACT}
    sizes = {"heads": described.batch * described.heads, "queries": described.queries, "keys": described.keys}
    return {"exact": exact, "sizes": sizes}
