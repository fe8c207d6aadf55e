"""The CUDA backend: the kernels of csrc, compiled by nvcc when sbkernels was installed, launched through sbkernels._C.

The extension knows nothing of torch: it takes packed parameters, raw pointers in them, and a stream.
"""

from __future__ import annotations

import functools

import torch

from ..problem import Problem
from ..sources import device_headers
from . import launches
from .base import Backend, Call
from .launches import CudaBackward, CudaForward, Launch

try:
    from .. import _C
except ImportError as error:
    raise ImportError(f"the CUDA extension was not built ({error}); see Build in the README") from error

MIN_CAPABILITY = (8, 0)
DTYPES = ("float16", "bfloat16")
# Bytes of shared memory a block may have, by compute capability (CUDA programming guide); of others what 8.6 has.
SHARED_LIMIT = {(8, 0): 163 * 2**10, (8, 7): 163 * 2**10, (9, 0): 227 * 2**10, (10, 0): 227 * 2**10}
SHARED_LIMIT_ELSEWHERE = 99 * 2**10


def _key(kernel: str, dtype: str, block_d: int, options: dict[str, int]) -> tuple:
    return kernel, dtype, block_d, tuple(sorted(options.items()))


# Kernels of the extension: key -> (number for launch, bytes of shared memory).
INSTANCES = {
    _key(it["kernel"], it["dtype"], it["block_d"], it["config"]): (number, it["shared_bytes"]) for number, it in enumerate(_C.instances())
}
WIDTHS = sorted({key[2] for key in INSTANCES})


def block_d(problem: Problem) -> int:
    """The compiled width that holds D and Dv."""
    return next(width for width in WIDTHS if width >= max(problem.head_dim, problem.value_dim))


class CudaBackend(Backend):
    name = "cuda"
    config_types = {"forward": CudaForward, "backward": CudaBackward}

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":
            return f"runs on CUDA devices, not on {problem.device}"
        if problem.dtype not in DTYPES:
            return f"takes {' and '.join(DTYPES)}, whose products run on tensor cores, not {problem.dtype}"
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < MIN_CAPABILITY:
            return f"needs compute capability {'.'.join(map(str, MIN_CAPABILITY))} or newer, {problem.device} has {'.'.join(map(str, capability))}"
        return None

    def default_config(self, problem: Problem):
        return _default_config(block_d(problem), problem.direction, _shared_limit(problem.device))

    def illegal(self, problem: Problem, config) -> str | None:
        limit = _shared_limit(problem.device)
        for kernel, options in _kernels(config).items():
            instance = INSTANCES.get(_key(kernel, problem.dtype, block_d(problem), options))
            if instance is None:
                return f"{kernel} with {options} is not among the kernels that were compiled for D up to {block_d(problem)}"
            if instance[1] > limit:
                return f"{kernel} with {options} takes {instance[1]} bytes of shared memory: expected at most {limit}"
        return None

    def mismatch(self, forward, backward) -> str | None:
        return launches.mismatch(forward, backward)

    def config_space(self, problem: Problem):
        return _config_space(block_d(problem), problem.direction)

    def sources(self):
        folder = device_headers()
        files = [path for pattern in ("*.cu", "*.cuh", "*.cpp", "*.h") for path in folder.glob(pattern)]
        return [__file__, launches.__file__, *sorted(map(str, files))]

    def versions(self):
        return {"cuda kernels": f"{len(INSTANCES)} compiled"}

    def forward(self, call: Call, config: CudaForward):
        out, remainder = call.empty_out(), call.empty_statistic()
        saved = (call.empty_statistic(), call.empty_statistic(torch.int32))
        _run(call, launches.plan_forward(call, config, out, remainder, *saved))
        return out, remainder, saved

    def backward(self, call: Call, config: CudaBackward, remainder, saved, dout, dremainder):
        dq, dk, dv = (call.empty_gradient(x) for x in (call.q, call.k, call.v))
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        for launch in launches.plan_backward(call, config, remainder, *saved, dout, dremainder.contiguous(), dq, dk, dv):
            _run(call, launch)
        return dq, dk, dv


def _run(call: Call, launch: Launch) -> None:
    if launch.grid:
        number, _ = INSTANCES[_key(launch.kernel, call.problem.dtype, block_d(call.problem), launch.options)]
        index = call.q.device.index
        _C.launch(number, launch.grid, launch.params, torch.cuda.current_stream(index).cuda_stream, index)


@functools.cache
def _shared_limit(device: str) -> int:
    return SHARED_LIMIT.get(torch.cuda.get_device_capability(device), SHARED_LIMIT_ELSEWHERE)


def _kernels(config) -> dict[str, dict[str, int]]:
    """The kernels a config runs, with their options."""
    if isinstance(config, CudaForward):
        return {"forward": vars(config)}
    return {kernel: config.of(kernel) for kernel in ("backward_queries", "backward_keys")}


def _options(kernel: str, width: int) -> list[dict[str, int]]:
    """Options of the compiled kernels of a width, in the table's order: the default first."""
    return [it["config"] for it in _C.instances() if it["kernel"] == kernel and it["block_d"] == width and it["dtype"] == DTYPES[0]]


@functools.cache
def _config_space(width: int, direction: str) -> list:
    """All combinations of compiled kernels that go together."""
    if direction == "forward":
        return [CudaForward(**options) for options in _options("forward", width)]
    found = []
    for queries in _options("backward_queries", width):
        for keys in _options("backward_keys", width):
            if queries["KEY_GROUP"] == keys["KEY_GROUP"]:
                named = {"KEY_GROUP": keys["KEY_GROUP"]}
                named |= {f"QUERIES_{name}": value for name, value in queries.items() if name != "KEY_GROUP"}
                named |= {f"KEYS_{name}": value for name, value in keys.items() if name != "KEY_GROUP"}
                found.append(CudaBackward(**named))
    return found


@functools.cache
def _default_config(width: int, direction: str, shared_limit: int):
    """The first combination of the table that fits the device's shared memory."""
    fits = lambda config: all(  # noqa: E731
        INSTANCES[_key(kernel, DTYPES[0], width, options)][1] <= shared_limit for kernel, options in _kernels(config).items()
    )
    return next(config for config in _config_space(width, direction) if fits(config))
