"""The PTX backend: the kernels of csrc in log space, compiled at run time by NVRTC through CuPy; no nvcc is needed.

A = 2^(s - sum of softplus2), the paper's form (Tan et al. 2024, eq. 4 and 5), with softplus2 from PTX's ex2.approx and a
polynomial (csrc/math.cuh): numerically independent of the linear-space kernels. Any head dim and tile is compiled on demand.
"""

from __future__ import annotations

import functools
import itertools

import torch

from ..problem import Problem
from ..sources import device_headers, included
from . import launches, nvrtc
from .base import Call
from .launches import CudaBackward, CudaForward, KernelBackend

TYPES = {"float16": "sbk::half", "bfloat16": "sbk::bfloat"}
# The log-space run is the one template argument that tells these kernels from the extension's.
SOURCE = f"""
#include "forward.cuh"
#include "backward_queries.cuh"
#include "backward_keys.cuh"
template <int R> using Run = sbk::LogRun<R>;
static_assert(sizeof(sbk::ForwardParams) == {launches.FORWARD_PARAMS.size});
static_assert(sizeof(sbk::BackwardParams) == {launches.BACKWARD_PARAMS.size});
"""
# The options of each kernel's config struct, in csrc's order; MT counts blocks of 16 of the ROWS.
CONFIGS = {
    "forward": ("ForwardConfig", "{BLOCK_M}, {BLOCK_N}, {NUM_WARPS}, {NUM_STAGES}"),
    "backward_queries": ("QueriesConfig", "{BLOCK_M}, {BLOCK_N}, {NUM_WARPS}, {NUM_STAGES}, {KEY_GROUP}"),
    "backward_keys": ("KeysConfig", "{BLOCK_M}, {ROWS} / 16, {NUM_WARPS}, {NUM_STAGES}, {KEY_GROUP}, {SPLIT}"),
}
OPTIONS = ("-default-device",)  # lambdas of kernels are device functions
WIDE = 128  # head dims beyond leave no registers for dk and dv of whole rows: two blocks share the columns


class PtxBackend(KernelBackend):
    name = "ptx"
    compiles = True

    def shared_bytes(self, problem: Problem, kernel: str, config):
        options = config.of(kernel)
        reason = launches.malformed(kernel, options)
        return reason or launches.shared_bytes(kernel, *_widths(problem), options)

    def config_pairs(self, problem: Problem):
        if max(_widths(problem)) > WIDE:
            forwards, keys = [(64, 32), (64, 16)], [(32, 16, 4, 2, 2)]
        else:
            # Forward alone, (128, 32) is 8 % faster at D = 128; the backward, which takes as many keys, loses twice as much by it.
            forwards = [(64, 64), (128, 32), (64, 32)] if max(_widths(problem)) > 64 else [(64, 64), (128, 64), (64, 32)]
            keys = [(64, 16, 4, 2, 1), (32, 16, 4, 2, 1)]
        return [
            (CudaForward(*forward, 4, 2), CudaBackward(16, 64, forward[1], 4, 2, *options))
            for forward, options in itertools.product(forwards, keys)
        ]

    def versions(self):
        return {"nvrtc": ".".join(map(str, nvrtc.VERSION))}

    def sources(self):
        return [__file__, nvrtc.__file__, launches.__file__, *included(SOURCE)]

    def compile(self, problem: Problem, config) -> None:
        for kernel in launches.KERNELS[problem.direction]:
            compiled(kernel, problem.dtype, _widths(problem), config, _arch(problem.device))

    def kernel(self, call: Call, kernel: str, config):
        """The loaded kernel, its threads, and its bytes of shared memory."""
        widths, options = _widths(call.problem), config.of(kernel)
        function = _function(kernel, call.problem.dtype, widths, config, call.q.device.index)
        return function, 32 * options["NUM_WARPS"], launches.shared_bytes(kernel, *widths, options)

    def launch(self, kernel, grid: int, params: bytes, device: int) -> None:
        function, threads, shared = kernel
        nvrtc.launch(function, grid, threads, shared, params, launches.current_stream(device), device)


def _widths(problem: Problem) -> tuple[int, int]:
    """BLOCK_D and BLOCK_DV: D and Dv in whole 16-wide steps of the matrix products, of 32 where two blocks share them."""
    step = 32 if max(problem.head_dim, problem.value_dim) > WIDE else 16
    return tuple(step * launches.ceil_div(dim, step) for dim in (problem.head_dim, problem.value_dim))


def compiled(kernel: str, dtype: str, widths: tuple[int, int], config, arch: str) -> tuple[nvrtc.Compiled, str]:
    """The cubin with one kernel for an architecture such as "sm_90", and the kernel's name expression."""
    struct, options = CONFIGS[kernel]
    options = options.format(**config.of(kernel))
    name = f"sbk::{kernel}_kernel<sbk::{struct}<{TYPES[dtype]}, Run, {widths[0]}, {widths[1]}, {options}>>"
    return nvrtc.compile_cubin(SOURCE, (name,), arch, OPTIONS, device_headers()), name


def _arch(device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _function(kernel: str, dtype: str, widths: tuple[int, int], config, device: int):
    """The loaded kernel."""
    cubin, name = compiled(kernel, dtype, widths, config, _arch(device))
    return nvrtc.load(cubin, device)[name]
