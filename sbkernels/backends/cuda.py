"""The CUDA backend: the kernels of csrc, compiled by nvcc when sbkernels was installed, launched through sbkernels._C.

The extension knows nothing of torch: it takes packed parameters, raw pointers in them, and a stream.
"""

from __future__ import annotations

import functools

import torch

from ..problem import Problem
from .base import Call
from .launches import DTYPES, CudaBackward, CudaForward, KernelBackend, Launch

try:
    from .. import _C
except ImportError as error:
    raise ImportError(f"the CUDA extension was not built ({error}); see Build in the README") from error


def _key(kernel: str, dtype: str, width: int, options: dict[str, int]) -> tuple:
    return kernel, dtype, width, tuple(sorted(options.items()))


# Kernels of the extension: key -> (number for launch, bytes of shared memory).
INSTANCES = {
    _key(it["kernel"], it["dtype"], it["block_d"], it["config"]): (number, it["shared_bytes"])
    for number, it in enumerate(_C.instances())
}
WIDTHS = sorted({key[2] for key in INSTANCES})


class CudaBackend(KernelBackend):
    name = "cuda"

    def shared_bytes(self, problem: Problem, kernel: str, config):
        width = compiled_width(max(problem.head_dim, problem.value_dim))
        instance = INSTANCES.get(_key(kernel, problem.dtype, width, config.of(kernel)))
        if instance is None:
            return f"{kernel} with {config.of(kernel)} is not among the kernels that were compiled for D up to {width}"
        return instance[1]

    def config_pairs(self, problem: Problem):
        return _config_pairs(compiled_width(max(problem.head_dim, problem.value_dim)))

    def versions(self):
        return {"cuda kernels": f"{len(INSTANCES)} compiled"}

    def launch(self, call: Call, config, launch: Launch) -> None:
        if launch.grid:
            problem, index = call.problem, call.q.device.index
            number = _number(launch.kernel, problem.dtype, max(problem.head_dim, problem.value_dim), config)
            _C.launch(number, launch.grid, launch.params, torch.cuda.current_stream(index).cuda_stream, index)


def compiled_width(head_dim: int) -> int:
    """The compiled BLOCK_D that holds the larger of D and Dv."""
    return next(width for width in WIDTHS if width >= head_dim)


@functools.cache
def _number(kernel: str, dtype: str, head_dim: int, config) -> int:
    """The instance to launch, found once for each kind of call."""
    return INSTANCES[_key(kernel, dtype, compiled_width(head_dim), config.of(kernel))][0]


@functools.cache
def _config_pairs(width: int) -> list[tuple[CudaForward, CudaBackward]]:
    """All combinations of compiled kernels that go together, in the table's order."""
    table = {}
    for it in _C.instances():
        if it["block_d"] == width and it["dtype"] == DTYPES[0]:
            table.setdefault(it["kernel"], []).append(it["config"])
    pairs = []
    for forward in table["forward"]:
        for queries in table["backward_queries"]:
            for keys in table["backward_keys"]:
                if queries["KEY_GROUP"] == keys["KEY_GROUP"] and forward["BLOCK_N"] == queries["BLOCK_N"]:
                    named = {f"QUERIES_{name}": value for name, value in queries.items() if name != "KEY_GROUP"}
                    named |= {f"KEYS_{name}": value for name, value in keys.items() if name != "KEY_GROUP"}
                    pairs.append((CudaForward(**forward), CudaBackward(KEY_GROUP=keys["KEY_GROUP"], **named)))
    return pairs
