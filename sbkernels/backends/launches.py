"""Plans the launches of csrc's kernels: what the backends that compile them ahead of time (cuda) and at run time (ptx) share.

Parameters are packed as csrc/params.h lays them out; tests hold the sizes against the compiled ones.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import struct
from typing import NamedTuple

import torch

from .. import env
from ..problem import Problem, is_aligned
from .base import Backend, Call, allocate

TENSOR = "4q"
SHAPE = "q10i2f"
FORWARD_PARAMS = struct.Struct("=" + 4 * TENSOR + SHAPE + "4q")
HOPPER_BACKWARD_ARGUMENTS = struct.Struct("=" + 7 * TENSOR + SHAPE + "6q")
BACKWARD_PARAMS = struct.Struct("=" + 7 * TENSOR + SHAPE + "9q7i4x")
KERNELS = {"forward": ("forward",), "backward": ("backward_queries", "backward_keys")}  # by direction
# Where FORWARD_PARAMS has what differs from call to call, in 8-byte words.
Q, K, V, OUT = (i * struct.calcsize("=" + TENSOR) // 8 for i in range(4))
CU_SEQLENS = struct.calcsize("=" + 4 * TENSOR) // 8
REMAINDER = struct.calcsize("=" + 4 * TENSOR + SHAPE) // 8
OLDEST_CARRY, OLDEST_TILE, TICKET = (REMAINDER + i for i in (1, 2, 3))
DTYPES = ("float16", "bfloat16")
MIN_CAPABILITY = (8, 0)
# Bytes of shared memory a block may have, by compute capability (CUDA programming guide); elsewhere what 8.6 and 12.0 have.
SHARED_LIMIT = {(8, 0): 163 * 2**10, (8, 7): 163 * 2**10, (9, 0): 227 * 2**10, (10, 0): 227 * 2**10}
SHARED_LIMIT_ELSEWHERE = 99 * 2**10
STATE_BYTES = 8  # of a row and a group of keys: two float32
# Key groups cover whole tiles of the dq kernel; keys of the largest such tile.
MAX_BLOCK_N = 128


@dataclasses.dataclass(frozen=True)
class CudaForward:
    """Tile sizes and launch options of the forward kernel: csrc/forward.cuh or, with HOPPER, csrc/hopper_forward.cuh."""

    BLOCK_M: int
    BLOCK_N: int
    NUM_WARPS: int
    NUM_STAGES: int
    HOPPER: bool = False

    def of(self, kernel: str) -> dict[str, int]:
        """Options of "forward" by their names in csrc."""
        return {name: value for name, value in vars(self).items() if name != "HOPPER"}


@dataclasses.dataclass(frozen=True)
class CudaBackward:
    """Tile sizes and launch options of the two backward kernels: QUERIES (csrc/backward_queries.cuh) and KEYS (backward_keys.cuh).

    KEY_GROUP keys share a state; QUERIES_BLOCK_N must be the forward's BLOCK_N, whose tiles it counts in. KEYS_ROWS query rows
    are worked on at a time; KEYS_SPLIT blocks share the columns of dk and dv. With HOPPER, csrc/hopper_backward.cuh, which has
    tiles of its own: nothing else is given.
    """

    KEY_GROUP: int = 0
    QUERIES_BLOCK_M: int = 0
    QUERIES_BLOCK_N: int = 0
    QUERIES_NUM_WARPS: int = 0
    QUERIES_NUM_STAGES: int = 0
    KEYS_BLOCK_M: int = 0
    KEYS_ROWS: int = 0
    KEYS_NUM_WARPS: int = 0
    KEYS_NUM_STAGES: int = 0
    KEYS_SPLIT: int = 0
    HOPPER: bool = False

    def of(self, kernel: str) -> dict[str, int]:
        """Options of "backward_queries" or "backward_keys" by their names in csrc."""
        if self.HOPPER:
            return {}
        prefix = {"backward_queries": "QUERIES_", "backward_keys": "KEYS_"}[kernel]
        values = {name: value for name, value in vars(self).items() if name.startswith(prefix)}
        return {"KEY_GROUP": self.KEY_GROUP} | {name.removeprefix(prefix): value for name, value in values.items()}


class Launch(NamedTuple):
    """One launch: the kernel's name, how many blocks (at least one), and its packed parameters."""

    kernel: str
    grid: int
    params: bytes


class KernelBackend(Backend):
    """A backend that runs csrc's kernels; a subclass finds the kernel for a problem and a config, and launches it."""

    config_types = {"forward": CudaForward, "backward": CudaBackward}

    def kernel(self, call: Call, kernel: str, config):
        """A kernel with this config's options for calls of a kind, as `launch` takes it."""
        raise NotImplementedError

    def launch(self, kernel, grid: int, params: bytes, device: int) -> None:
        """Enqueue `grid` blocks of a kernel on the device's current stream."""
        raise NotImplementedError

    def shared_bytes(self, problem: Problem, kernel: str, config) -> int | str:
        """Bytes of shared memory a kernel takes, or why there is no such kernel."""
        raise NotImplementedError

    def config_pairs(self, problem: Problem) -> list[tuple[CudaForward, CudaBackward]]:
        """Configs of both directions that go together; the first that fits the device is the default of large problems."""
        raise NotImplementedError

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda":
            return f"runs on CUDA devices, not on {problem.device}"
        if problem.dtype not in DTYPES:
            return f"takes {' and '.join(DTYPES)}, whose products run on tensor cores, not {problem.dtype}"
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < MIN_CAPABILITY:
            needed, found = (".".join(map(str, x)) for x in (MIN_CAPABILITY, capability))
            return f"needs compute capability {needed} or newer, {problem.device} has {found}"
        if self.default_config(problem) is None:
            dims = f"{problem.head_dim} and {problem.value_dim}"
            return f"has no config for head dims {dims} that fits {problem.device}'s shared memory"
        return None

    def default_config(self, problem: Problem):
        pairs = fitting_configs(self, problem.head_dim, problem.value_dim, problem.dtype, problem.device)
        if not pairs:
            return None
        chosen = pairs[0]
        if query_blocks(problem, chosen[0]) < multiprocessors(problem.device):  # smaller blocks keep more of the device busy
            chosen = min(pairs, key=lambda pair: pair[0].BLOCK_M)
        return chosen[0 if problem.direction == "forward" else 1]

    def illegal(self, problem: Problem, config) -> str | None:
        limit = shared_limit(problem.device)
        for kernel in KERNELS[problem.direction]:
            taken = self.shared_bytes(problem, kernel, config)
            if isinstance(taken, str):
                return taken
            if taken > limit:
                return f"{kernel} with {config.of(kernel)} takes {taken} bytes of shared memory: expected at most {limit}"
        return None

    def mismatch(self, forward: CudaForward, backward: CudaBackward) -> str | None:
        if forward.HOPPER != backward.HOPPER:
            return f"HOPPER={forward.HOPPER} forward and {backward.HOPPER} backward: expected the same"
        if not forward.HOPPER and forward.BLOCK_N != backward.QUERIES_BLOCK_N:
            return f"BLOCK_N={forward.BLOCK_N} forward and QUERIES_BLOCK_N={backward.QUERIES_BLOCK_N} backward: expected the same"
        return None

    def config_space(self, problem: Problem):
        index = 0 if problem.direction == "forward" else 1
        return list(dict.fromkeys(pair[index] for pair in self.config_pairs(problem)))

    def forward(self, call: Call, config: CudaForward):
        out, remainder = call.empty_out(), call.empty_statistic()
        saved = (call.empty_statistic(), call.empty_statistic(torch.int32)) if call.saves else (None, None)
        kept = {} if call.kept is None else call.kept
        prepared = kept.get("forward")
        if prepared is None or prepared.scale != call.scale or prepared.skip_below != call.skip_below:
            prepared = kept["forward"] = self.prepare_forward(call, config, out)
        params, _alive = prepared.params(call, out, remainder, *saved)
        self.launch(prepared.kernel, prepared.grid, params, call.q.device.index)
        return out, remainder, saved

    def prepare_forward(self, call: Call, config: CudaForward, out) -> PreparedForward:
        """The launch that calls of this kind share."""
        kernel = self.kernel(call, "forward", config)
        return PreparedForward(kernel, query_blocks(call.problem, config), *pack_forward(call, out))

    def backward(self, call: Call, config: CudaBackward, remainder, saved, dout, dremainder):
        dq, dk, dv = (call.empty_gradient(x) for x in (call.q, call.k, call.v))
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        for launch in plan_backward(call, config, remainder, *saved, dout, dremainder.contiguous(), dq, dk, dv):
            self.launch(self.kernel(call, launch.kernel, config), launch.grid, launch.params, call.q.device.index)
        return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class PreparedForward:
    """A forward's only launch but for its pointers. A short call's time is the host's: the rest is packed once."""

    kernel: object
    grid: int
    words: array.array  # FORWARD_PARAMS in 8-byte words
    scale: float  # this and skip_below are in there
    skip_below: float

    def params(self, call: Call, out, remainder, oldest_carry, oldest_tile, ticket=None) -> tuple[bytes, object]:
        """What to launch with, and what must not be freed before; oldest_carry, oldest_tile and ticket may be None."""
        words = self.words[:]
        words[Q], words[K], words[V], words[OUT] = call.q.data_ptr(), call.k.data_ptr(), call.v.data_ptr(), out.data_ptr()
        words[CU_SEQLENS], words[REMAINDER] = _pointer(call.cu_seqlens), remainder.data_ptr()
        words[OLDEST_CARRY], words[OLDEST_TILE], words[TICKET] = map(_pointer, (oldest_carry, oldest_tile, ticket))
        return words.tobytes(), (call, ticket)


def pack_forward(call: Call, out) -> tuple[array.array, float, float]:
    """The last three fields of a PreparedForward."""
    tensors = [value for x in (call.q, call.k, call.v, out) for value in pack_tensor(x)]
    packed = FORWARD_PARAMS.pack(*tensors, *pack_shape(call, call.problem.aligned), 0, 0, 0, 0)
    return array.array("q", packed), call.scale, call.skip_below


def malformed(kernel: str, options: dict[str, int]) -> str | None:
    """Why csrc's templates would refuse these options; None if they take them."""
    o = options
    if any(value < 1 for value in o.values()) or o["NUM_STAGES"] < 2:
        return f"{kernel} with {o}: expected positive numbers, NUM_STAGES of 2 or more"
    if kernel == "backward_keys":
        if o["ROWS"] % 16 or o["BLOCK_M"] % o["ROWS"] or o["KEY_GROUP"] % 16 or o["SPLIT"] > 2:
            expected = "ROWS a multiple of 16 that divides BLOCK_M, KEY_GROUP a multiple of 16, SPLIT 1 or 2"
            return f"{kernel} with {o}: expected {expected}"
        return None
    if o["BLOCK_M"] % (16 * o["NUM_WARPS"]) or o["BLOCK_N"] % 16 or MAX_BLOCK_N % o["BLOCK_N"]:
        return f"{kernel} with {o}: expected BLOCK_M a multiple of 16 NUM_WARPS, BLOCK_N of 16 that divides {MAX_BLOCK_N}"
    if kernel == "backward_queries" and o["KEY_GROUP"] * 4 not in (o["BLOCK_N"], 2 * o["BLOCK_N"], 4 * o["BLOCK_N"]):
        return f"{kernel} with {o}: expected KEY_GROUP to be 1, 2 or 4 quarters of BLOCK_N"
    return None


def shared_bytes(kernel: str, block_d: int, block_dv: int, options: dict[str, int]) -> int:
    """SHARED_BYTES of csrc's config structs."""
    o = options
    tiles = lambda rows: 2 * rows * (block_d + 8 + block_dv + 8)  # noqa: E731
    if kernel == "forward":
        return 2 * o["BLOCK_M"] * (block_d + 8) + o["NUM_STAGES"] * tiles(o["BLOCK_N"])
    if kernel == "backward_queries":
        return tiles(o["BLOCK_M"]) + o["NUM_STAGES"] * tiles(o["BLOCK_N"])
    keys = o["NUM_WARPS"] * o["KEY_GROUP"]
    stages = o["NUM_STAGES"] * (tiles(o["BLOCK_M"]) + 8 * o["NUM_WARPS"] * o["BLOCK_M"] + 16)
    kept_v = 0 if o["SPLIT"] == 1 and block_dv <= 64 else 2 * keys * (block_dv + 8)
    kept_k = 0 if o["SPLIT"] == 1 else 2 * keys * (block_d + 8)
    return max(kept_v + kept_k + stages, tiles(keys))


@functools.cache
def fitting_configs(backend: KernelBackend, head_dim: int, value_dim: int, dtype: str, device: str):
    """Those (forward, backward) of the backend's config_pairs that fit the device."""
    problem = Problem(1, 1, 1, 1, 1, head_dim, value_dim, dtype, device)
    fit = lambda direction, config: KernelBackend.illegal(backend, direction, config) is None  # noqa: E731
    return [pair for pair in backend.config_pairs(problem) if fit(problem, pair[0]) and fit(problem.reversed(), pair[1])]


@functools.cache
def shared_limit(device: str) -> int:
    """Bytes of shared memory a block may have on a CUDA device."""
    return SHARED_LIMIT.get(torch.cuda.get_device_capability(device), SHARED_LIMIT_ELSEWHERE)


@functools.cache
def multiprocessors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def query_blocks(problem: Problem, config: CudaForward) -> int:
    """How many blocks of BLOCK_M query rows there are."""
    return problem.batch * problem.heads * ceil_div(problem.queries, config.BLOCK_M)


def current_stream(device: int) -> int:
    """The device's current cudaStream_t. What torch.cuda.current_stream wraps into an object, which takes ten times as long."""
    return torch._C._cuda_getCurrentRawStream(device)


def _pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def pack_tensor(x: torch.Tensor) -> tuple[int, int, int, int]:
    stride_b, stride_h, stride_row, _ = x.stride()
    return x.data_ptr(), stride_b, stride_h, stride_row


def pack_shape(call: Call, aligned: bool) -> tuple:
    p = call.problem
    return (
        _pointer(call.cu_seqlens), p.batch, p.heads, p.heads // p.kv_heads, p.queries, p.keys, p.head_dim, p.value_dim,
        p.tokens if p.varlen else p.queries, p.attend_current, aligned, call.scale, call.skip_below,
    )  # fmt: skip


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plan_backward(call: Call, config: CudaBackward, remainder, oldest_carry, oldest_tile, dout, dremainder, dq, dk, dv):
    """The backward's launches, chunk by chunk: (batch, key head) pairs and query rows such that the state fits the workspace.

    Scratch is allocated here and lives as long as the generator.
    """
    p = call.problem
    units, group = p.batch * p.kv_heads, p.heads // p.kv_heads
    block_m, key_groups = config.QUERIES_BLOCK_M, ceil_div(p.keys, MAX_BLOCK_N) * (MAX_BLOCK_N // config.KEY_GROUP)
    chunk_units, chunk_rows = chunk_sizes(p, STATE_BYTES * key_groups * group, max(block_m, config.KEYS_BLOCK_M), env.workspace())
    carry, older = (allocate((chunk_units * group, key_groups, chunk_rows), remainder) for _ in range(2))
    block_oldest = allocate((chunk_units * group, chunk_rows // block_m), remainder, torch.int32)
    sums = [None if chunk_rows >= p.queries else allocate((chunk_units, p.keys, x.shape[3]), remainder) for x in (dk, dv)]
    statistics_and_scratch = (remainder, dremainder, oldest_carry, oldest_tile, carry, older, block_oldest, *sums)
    fixed = (
        *(value for x in (call.q, call.k, call.v, dout, dq, dk, dv) for value in pack_tensor(x)),
        *pack_shape(call, p.aligned and is_aligned(dout)),
        *map(_pointer, statistics_and_scratch),
    )
    key_tiles = ceil_div(p.keys, config.KEYS_NUM_WARPS * config.KEY_GROUP)
    for unit in range(0, units, chunk_units):
        units_here = min(chunk_units, units - unit)
        for row in range(0, p.queries, chunk_rows):
            last = row + chunk_rows >= p.queries
            params = BACKWARD_PARAMS.pack(*fixed, unit, row, chunk_rows, key_groups, block_m, row == 0, last)
            yield Launch("backward_queries", units_here * group * chunk_rows // block_m, params)
            yield Launch("backward_keys", units_here * key_tiles * config.KEYS_SPLIT, params)


def chunk_sizes(problem: Problem, row_bytes: int, block: int, workspace: int) -> tuple[int, int]:
    """((batch, key head) pairs, query rows) per chunk such that row_bytes for each row of each pair fit `workspace` bytes.

    At least one pair and one block of rows; all of a pair's rows wherever they fit, and then chunks of about the same size.
    """
    blocks = ceil_div(problem.queries, block)
    units = problem.batch * problem.kv_heads
    fitting = workspace // (row_bytes * blocks * block)
    if fitting == 0:
        return 1, max(1, workspace // (row_bytes * block)) * block
    return ceil_div(units, ceil_div(units, fitting)), blocks * block
