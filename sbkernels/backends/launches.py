"""Plans the launches of csrc's kernels, for the backends that compile them ahead of time (cuda) and at run time (ptx).

Parameters are packed as csrc/params.h lays them out; tests hold the sizes against the compiled ones.
"""

from __future__ import annotations

import dataclasses
import struct

import torch

from .. import env
from ..problem import Problem, is_aligned
from .base import Call, allocate

TENSOR = "4q"
SHAPE = "q10i2f"
FORWARD_PARAMS = struct.Struct("=" + 4 * TENSOR + SHAPE + "3q")
BACKWARD_PARAMS = struct.Struct("=" + 7 * TENSOR + SHAPE + "9q7i4x")
STATE_BYTES = 8  # of a row and a group of keys: two float32
# Key groups cover whole tiles of the dq kernel; keys of the largest such tile.
MAX_BLOCK_N = 128


@dataclasses.dataclass(frozen=True)
class CudaForward:
    """Tile sizes and launch options of the forward kernel (csrc/forward.cuh)."""

    BLOCK_M: int
    BLOCK_N: int
    NUM_WARPS: int
    NUM_STAGES: int


@dataclasses.dataclass(frozen=True)
class CudaBackward:
    """Tile sizes and launch options of the two backward kernels: QUERIES (csrc/backward_queries.cuh) and KEYS (backward_keys.cuh).

    KEY_GROUP keys share a state; QUERIES_BLOCK_N must be the forward's BLOCK_N, whose tiles it counts in. KEYS_ROWS query rows
    are worked on at a time; KEYS_SPLIT blocks share the columns of dk and dv.
    """

    KEY_GROUP: int
    QUERIES_BLOCK_M: int
    QUERIES_BLOCK_N: int
    QUERIES_NUM_WARPS: int
    QUERIES_NUM_STAGES: int
    KEYS_BLOCK_M: int
    KEYS_ROWS: int
    KEYS_NUM_WARPS: int
    KEYS_NUM_STAGES: int
    KEYS_SPLIT: int

    def of(self, kernel: str) -> dict[str, int]:
        """Options of "backward_queries" or "backward_keys" by their names in csrc."""
        prefix = {"backward_queries": "QUERIES_", "backward_keys": "KEYS_"}[kernel]
        values = {name: value for name, value in vars(self).items() if name.startswith(prefix)}
        return {"KEY_GROUP": self.KEY_GROUP} | {name.removeprefix(prefix): value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its options, how many blocks, and its packed parameters."""

    kernel: str
    options: dict[str, int]
    grid: int
    params: bytes


def mismatch(forward: CudaForward, backward: CudaBackward) -> str | None:
    """Why the backward cannot start from what the forward saves; None if it can."""
    if forward.BLOCK_N != backward.QUERIES_BLOCK_N:
        return f"BLOCK_N={forward.BLOCK_N} forward and QUERIES_BLOCK_N={backward.QUERIES_BLOCK_N} backward: expected the same"
    return None


def _tensor(x: torch.Tensor) -> tuple[int, int, int, int]:
    stride_b, stride_h, stride_row, _ = x.stride()
    return x.data_ptr(), stride_b, stride_h, stride_row


def _shape(call: Call, stat_rows: int, aligned: bool) -> tuple:
    p = call.problem
    cu_seqlens = 0 if call.cu_seqlens is None else call.cu_seqlens.data_ptr()
    return (
        cu_seqlens, p.batch, p.heads, p.heads // p.kv_heads, p.queries, p.keys, p.head_dim, p.value_dim,
        stat_rows, p.attend_current, aligned, call.scale, call.skip_below,
    )  # fmt: skip


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plan_forward(call: Call, config: CudaForward, out, remainder, oldest_carry, oldest_tile) -> Launch:
    """The forward's only launch."""
    p = call.problem
    params = FORWARD_PARAMS.pack(
        *_tensor(call.q), *_tensor(call.k), *_tensor(call.v), *_tensor(out),
        *_shape(call, call.q.shape[2], p.aligned),
        remainder.data_ptr(), oldest_carry.data_ptr(), oldest_tile.data_ptr(),
    )  # fmt: skip
    return Launch("forward", vars(config), ceil_div(p.queries, config.BLOCK_M) * p.batch * p.heads, params)


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
    fixed = (
        *(value for x in (call.q, call.k, call.v, dout, dq, dk, dv) for value in _tensor(x)),
        *_shape(call, call.q.shape[2], p.aligned and is_aligned(dout)),
        *(0 if x is None else x.data_ptr() for x in (remainder, dremainder, oldest_carry, oldest_tile, carry, older, block_oldest, *sums)),
    )  # fmt: skip
    queries, keys = config.of("backward_queries"), config.of("backward_keys")
    key_tiles = ceil_div(p.keys, config.KEYS_NUM_WARPS * config.KEY_GROUP)
    for unit in range(0, units, chunk_units):
        units_here = min(chunk_units, units - unit)
        for row in range(0, p.queries, chunk_rows):
            last = row + chunk_rows >= p.queries
            params = BACKWARD_PARAMS.pack(*fixed, unit, row, chunk_rows, key_groups, block_m, row == 0, last)
            yield Launch("backward_queries", queries, units_here * group * chunk_rows // block_m, params)
            yield Launch("backward_keys", keys, units_here * key_tiles * config.KEYS_SPLIT, params)


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
