"""The Triton backend: plans launches of sbkernels.triton_kernels. Kernels compute, this file picks and allocates.

Runs on CUDA devices from sm_80 on and, for tests on a machine without one, through Triton's interpreter
(TRITON_INTERPRET=1 before triton is imported).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib

import torch

try:
    import triton
except ImportError as error:
    raise ImportError("Triton is not installed: pip install 'sbkernels[triton]'") from error

from .. import env
from ..problem import Problem, is_aligned
from ..triton_kernels import step
from ..triton_kernels.backward_keys import backward_keys_kernel
from ..triton_kernels.backward_queries import backward_queries_kernel
from ..triton_kernels.forward import forward_kernel
from . import triton_configs
from .base import Backend, Call, allocate, described_call
from .triton_configs import TritonBackward, TritonForward, default_config, interpreting

MIN_CAPABILITY = (8, 0)
SMALLEST_DOT = 16  # tl.dot takes no dimension below this
GPU_DTYPES = ("float16", "bfloat16")
INTERPRETER_DTYPES = ("float32", "float16")
STATE_BYTES = 8  # two float32 a (row, key tile)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: what to run, on which grid, with which arguments by name."""

    kernel: object
    programs: int
    arguments: dict
    num_warps: int
    num_stages: int

    def run(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)

    def compile(self) -> None:
        """What run() would compile; tensors may be on the meta device."""
        self.kernel.warmup(**self.arguments, grid=(self.programs,), num_warps=self.num_warps, num_stages=self.num_stages)


class TritonBackend(Backend):
    name = "triton"
    compiles = True
    config_types = {"forward": TritonForward, "backward": TritonBackward}

    def unsupported(self, problem: Problem) -> str | None:
        if interpreting():
            if problem.dtype == "bfloat16":
                return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there, or a GPU"
            if problem.dtype not in INTERPRETER_DTYPES:
                return f"takes {' and '.join(INTERPRETER_DTYPES)} through the interpreter, not {problem.dtype}"
            return None
        if problem.device_type != "cuda":
            return f"runs on CUDA devices, not on {problem.device}; through Triton's interpreter with TRITON_INTERPRET=1"
        if problem.dtype not in GPU_DTYPES:
            return f"takes {' and '.join(GPU_DTYPES)} on a GPU, where its products run on tensor cores, not {problem.dtype}"
        capability = device_capability(problem.device)
        if capability < MIN_CAPABILITY:
            return f"needs compute capability {_dotted(MIN_CAPABILITY)} or newer, {problem.device} has {_dotted(capability)}"
        return None

    def slow(self, problem: Problem) -> str | None:
        return "runs through Triton's interpreter, for correctness only" if interpreting() else None

    def default_config(self, problem: Problem):
        return default_config(problem, device_capability(problem.device))

    def variants(self, problem: Problem):
        return {"log space": default_config(problem, device_capability(problem.device), log_space=True)}

    def illegal(self, problem: Problem, config) -> str | None:
        for field, value in dataclasses.asdict(config).items():
            if field.startswith("BLOCK") and (value not in (16, 32, 64, 128, 256)):
                return f"{field}={value}: expected a power of two from 16 to 256"
            if field.endswith("WARPS") and value not in (1, 2, 4, 8, 16):
                return f"{field}={value}: expected a power of two up to 16"
            if field.endswith(("STAGES", "FIRST")) and not 1 <= value <= 64:
                return f"{field}={value}: expected 1 to 64"
        if config.BLOCK_N < 32:
            return f"BLOCK_N={config.BLOCK_N}: a row's keys are 4 runs of at least 8"
        hopper = problem.device_type == "cuda" and device_capability(problem.device) >= (9, 0)
        if hopper and not problem.aligned and (config.BLOCK_M, config.BLOCK_N) != (32, 32):
            return "unaligned rows need 32 by 32 tiles on sm_90: see UNALIGNED_SM90"
        if hopper and getattr(config, "KEYS_TRANSPOSED", False) and config.KEYS_NUM_STAGES < 2:
            return "KEYS_TRANSPOSED needs KEYS_NUM_STAGES of 2 or more: see UNALIGNED_SM90"
        return None

    def mismatch(self, forward, backward) -> str | None:
        if forward.BLOCK_N != backward.BLOCK_N:
            return f"BLOCK_N={forward.BLOCK_N} forward and {backward.BLOCK_N} backward: expected the same"
        return None

    def config_space(self, problem: Problem):
        flags = (False, True)
        for (block_m, block_n), warps in itertools.product([(64, 32), (64, 64), (128, 32), (128, 64)], (4, 8)):
            if problem.direction == "forward":
                yield from (TritonForward(block_m, block_n, warps, stages) for stages in (2, 3, 4))
            else:
                for queries, keys, recompute, transposed in itertools.product((2, 3), (2, 3), flags, flags):
                    yield TritonBackward(block_m, block_n, warps, queries, warps, keys, recompute, transposed)

    def versions(self):
        return {"triton": triton.__version__ + (" (interpreter)" if interpreting() else "")}

    def sources(self):
        folder = pathlib.Path(step.__file__).parent
        return [__file__, triton_configs.__file__, *sorted(str(path) for path in folder.glob("*.py"))]

    def compile(self, problem: Problem, config) -> None:
        if interpreting():
            return
        call = described_call(problem)
        out, remainder = call.empty_out(), call.empty_statistic()
        saved = (call.empty_statistic(torch.int32), call.empty_statistic())
        with torch.cuda.device(problem.device):
            if problem.direction == "forward":
                plan_forward(call, config, out, remainder, *saved).compile()
                return
            gradients = (call.empty_gradient(x) for x in (call.q, call.k, call.v))
            for launch in plan_backward(call, config, remainder, *saved, out, remainder, *gradients):
                launch.compile()

    def forward(self, call: Call, config: TritonForward):
        out, remainder = call.empty_out(), call.empty_statistic()
        saved = (call.empty_statistic(torch.int32), call.empty_statistic())
        with _on_device(call.q):
            plan_forward(call, config, out, remainder, *saved).run()
        return out, remainder, saved

    def backward(self, call: Call, config: TritonBackward, remainder, saved, dout, dremainder):
        dq, dk, dv = (call.empty_gradient(x) for x in (call.q, call.k, call.v))
        if dout.stride(-1) != 1 or (call.problem.aligned and not is_aligned(dout)):
            dout = dout.clone(memory_format=torch.contiguous_format)  # contiguous() keeps what only begins at an odd place
        with _on_device(call.q):
            for launch in plan_backward(call, config, remainder, *saved, dout, dremainder.contiguous(), dq, dk, dv):
                launch.run()
        return dq, dk, dv


@functools.cache
def device_capability(device: str) -> tuple[int, int]:
    """(major, minor) of a CUDA device; the oldest supported one for anything else."""
    return torch.cuda.get_device_capability(device) if device.startswith("cuda") else MIN_CAPABILITY


def _dotted(capability) -> str:
    return ".".join(map(str, capability))


def _on_device(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _shapes(call: Call, config) -> dict:
    """Arguments all kernels share."""
    problem = call.problem
    return {
        "H": problem.heads,
        "M": problem.queries,
        "N": problem.keys,
        "GROUP": problem.group,
        "D": problem.head_dim,
        "DV": problem.value_dim,
        "BLOCK_D": max(SMALLEST_DOT, triton.next_power_of_2(problem.head_dim)),
        "BLOCK_DV": max(SMALLEST_DOT, triton.next_power_of_2(problem.value_dim)),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "ATTEND_CURRENT": problem.attend_current,
        "VARLEN": problem.varlen,
        "ALIGNED": problem.aligned,
        "SKIP": call.skip_below > 0,
        "LOG_SPACE": config.LOG_SPACE,
        "scale_log2": call.scale * math.log2(math.e),
        "cu_seqlens_ptr": call.cu_seqlens,
    }


def _even(problem: Problem, length: int, block: int) -> bool:
    """Whether no block reaches beyond the end of a sequence."""
    return not problem.varlen and length % block == 0


def _strides(**tensors: torch.Tensor) -> dict:
    """Strides of canonical tensors by argument name; the row stride's letter tells queries (m) from keys (n).

    The stride of a dimension with one entry means nothing: 0 keeps it from being taken for one that leaves rows unaligned.
    """
    result = {}
    for name, x in tensors.items():
        letters = ("b", "h", "n" if name in ("k", "v", "dk", "dv") else "m")
        strides = (stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))
        result |= {f"{name}_stride_{letter}": stride for letter, stride in zip(letters, strides, strict=False)}
    return result


def plan_forward(call: Call, config: TritonForward, out, remainder, oldest_tile, log2_oldest) -> Launch:
    """The forward's only launch."""
    problem = call.problem
    arguments = {
        **_shapes(call, config),
        **_strides(q=call.q, k=call.k, v=call.v, out=out),
        "stat_stride_b": remainder.stride(0),
        "stat_stride_h": remainder.stride(1),
        "q_ptr": call.q,
        "k_ptr": call.k,
        "v_ptr": call.v,
        "out_ptr": out,
        "remainder_ptr": remainder,
        "oldest_tile_ptr": oldest_tile,
        "log2_oldest_ptr": log2_oldest,
        "skip_below": float(call.skip_below),
        "SKIP_FIRST": config.SKIP_FIRST,
        "EVEN_N": _even(problem, problem.keys, config.BLOCK_N),
    }
    programs = triton.cdiv(problem.queries, config.BLOCK_M) * problem.batch * problem.heads
    return Launch(forward_kernel, programs, arguments, config.NUM_WARPS, config.NUM_STAGES)


def plan_backward(
    call: Call, config: TritonBackward, remainder, oldest_tile, log2_oldest, dout, dremainder, dq, dk, dv
):  # fmt: skip
    """The backward's launches, chunk by chunk: (batch, key head) pairs and query rows such that the state fits the workspace."""
    problem = call.problem
    units, group = problem.batch * problem.kv_heads, problem.group
    key_tiles = triton.cdiv(problem.keys, config.BLOCK_N)
    chunk_units, chunk_rows = chunk_sizes(problem, key_tiles, config.BLOCK_M, env.workspace())
    state = allocate((chunk_units * group, key_tiles, chunk_rows, 2), remainder)
    block_oldest = allocate((chunk_units * group, chunk_rows // config.BLOCK_M), remainder, torch.int32)
    one_chunk_of_rows = chunk_rows >= problem.queries
    sums = [None if one_chunk_of_rows else allocate((chunk_units, problem.keys, x.shape[3]), remainder) for x in (dk, dv)]
    shared = {
        **_shapes(call, config),
        "scale": call.scale,
        "q_ptr": call.q,
        "k_ptr": call.k,
        "v_ptr": call.v,
        "dout_ptr": dout,
        "state_ptr": state,
        "block_oldest_ptr": block_oldest,
        "chunk_rows": chunk_rows,
        "key_tiles": key_tiles,
    }
    queries = {
        **shared,
        **_strides(q=call.q, k=call.k, v=call.v, dout=dout, dq=dq),
        "stat_stride_b": remainder.stride(0),
        "stat_stride_h": remainder.stride(1),
        "dremainder_ptr": dremainder,
        "remainder_ptr": remainder,
        "oldest_tile_ptr": oldest_tile,
        "log2_oldest_ptr": log2_oldest,
        "dq_ptr": dq,
        "EVEN_N": _even(problem, problem.keys, config.BLOCK_N),
    }
    keys = {
        **shared,
        **_strides(q=call.q, k=call.k, v=call.v, dout=dout, dk=dk, dv=dv),
        "one": 1.0,
        "dk_ptr": dk,
        "RECOMPUTE": config.KEYS_RECOMPUTE,
        "TRANSPOSED": config.KEYS_TRANSPOSED,
        "dv_ptr": dv,
        "dk_sum_ptr": sums[0],
        "dv_sum_ptr": sums[1],
        "EVEN_M": _even(problem, problem.queries, config.BLOCK_M),
    }
    for unit in range(0, units, chunk_units):
        units_here = min(chunk_units, units - unit)
        for row in range(0, problem.queries, chunk_rows):
            chunk = {"unit_begin": unit, "row_begin": row}
            yield Launch(
                backward_queries_kernel,
                units_here * group * chunk_rows // config.BLOCK_M,
                queries | chunk,
                config.QUERIES_NUM_WARPS,
                config.QUERIES_NUM_STAGES,
            )
            flags = {"FIRST_ROWS": row == 0, "LAST_ROWS": row + chunk_rows >= problem.queries}
            yield Launch(
                backward_keys_kernel,
                units_here * key_tiles,
                keys | chunk | flags,
                config.KEYS_NUM_WARPS,
                config.KEYS_NUM_STAGES,
            )


def chunk_sizes(problem: Problem, key_tiles: int, block_m: int, workspace: int) -> tuple[int, int]:
    """((batch, key head) pairs, query rows) per chunk whose state fits `workspace` bytes; at least one pair and one block.

    Rows are a multiple of block_m, and all of a pair's rows wherever a pair fits.
    """
    block_bytes = STATE_BYTES * key_tiles * problem.group * block_m
    blocks = triton.cdiv(problem.queries, block_m)
    if block_bytes * blocks <= workspace:
        return min(problem.batch * problem.kv_heads, workspace // (block_bytes * blocks)), blocks * block_m
    return 1, max(1, workspace // block_bytes) * block_m
