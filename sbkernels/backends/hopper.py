"""Plans the launches of csrc's Hopper kernels, which load through tensor maps, multiply by warpgroups and, backward, chain the
key tiles of a query block. What they do not cover takes the portable kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from .. import env
from ..problem import Problem
from . import launches
from .base import Call, allocate
from .launches import CudaForward, Launch, ceil_div

CAPABILITY = (9, 0)
BLOCK_M = 64  # query rows of a block of the backward
# Fewer, of the longest sequence, take the portable kernels less time: a warp copies tiles that are not whole (csrc/hopper.cuh).
MIN_KEYS = 128


def not_covered(problem: Problem) -> str | None:
    """Why the Hopper kernels do not run a problem; None if they do."""
    capability = torch.cuda.get_device_capability(problem.device)
    if capability != CAPABILITY:
        return f"needs compute capability 9.0, {problem.device} has {'.'.join(map(str, capability))}"
    if problem.keys < MIN_KEYS:
        return f"takes {MIN_KEYS} keys or more, not {problem.keys}"
    if not problem.aligned:
        return "takes rows that start on multiples of 16 bytes"
    return None


def mappable(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, N, D], or a dense copy where a tensor map cannot say its strides."""
    steps = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    says = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)
    return x if says else x.clone(memory_format=torch.contiguous_format)  # contiguous() keeps what only begins at an odd place


def mappable_blocks(x: torch.Tensor) -> torch.Tensor:
    """The same of keys that are to be loaded in whole blocks (csrc/tensor_map.cpp, map_keys)."""
    batch, heads, rows, _ = x.shape
    stride_b, stride_h, stride_row, _ = x.stride()
    folds = batch == 1 or heads == 1 or stride_b in (heads * stride_h, rows * stride_row)
    return mappable(x) if folds else x.contiguous()


def mapped(call: Call) -> Call:
    """The call with tensors that maps can address."""
    q, k, v = mappable(call.q), mappable_blocks(call.k), mappable_blocks(call.v)
    return call if q is call.q and k is call.k and v is call.v else call._replace(q=q, k=k, v=v)


class PreparedForward(launches.PreparedForward):
    """Of inputs that tensor maps can address, and blocks that share the query blocks out by a ticket."""

    def params(self, call: Call, out, remainder, oldest_carry, oldest_tile) -> tuple[bytes, object]:
        ticket = allocate((1,), remainder, torch.int32)
        return super().params(mapped(call), out, remainder, oldest_carry, oldest_tile, ticket)


def prepare_forward(call: Call, kernel, config: CudaForward, out) -> PreparedForward:
    """The launch that calls of this kind share: at most a block a multiprocessor."""
    grid = min(launches.query_blocks(call.problem, config), launches.multiprocessors(call.problem.device))
    return PreparedForward(kernel, grid, *launches.pack_forward(mapped(call), out))


def plan_backward(call: Call, block_n: int, scratch_bytes, remainder, oldest_carry, oldest_tile, dout, dremainder, dq, dk, dv):
    """The backward's launches, for as many batch entries, or key heads of one, at a time as the workspace has scratch for.

    block_n: keys of a tile, the forward's. scratch_bytes(blocks): what so many blocks of BLOCK_M query rows take. At least a key
    head is taken.
    """
    problem, error = call.problem, error_flag(call.q.device)
    group, head_blocks = problem.group, ceil_div(problem.queries, BLOCK_M)
    if problem.varlen:  # one entry; each sequence has blocks of its own
        batch, scratch_blocks = 1, group * (problem.tokens // BLOCK_M + problem.batch)
    else:
        batch, scratch_blocks = problem.batch, group * head_blocks
    fit = max(1, env.workspace() // scratch_bytes(scratch_blocks))  # key heads
    heads = ceil_div(problem.kv_heads, ceil_div(problem.kv_heads, fit))  # parts of equal size
    entries = ceil_div(batch, ceil_div(batch, max(1, fit // problem.kv_heads)))
    scratch = allocate((ceil_div(scratch_bytes(entries * heads * scratch_blocks), 4),), remainder, torch.int32)
    q, k, v, dout = (mappable(x) for x in (call.q, call.k, call.v, dout))
    whole = heads == problem.kv_heads and entries == batch
    for entry, head in itertools.product(range(0, batch, entries), range(0, problem.kv_heads, heads)):
        n, here = min(heads, problem.kv_heads - head), slice(entry, entry + entries)

        def of_keys(*tensors, here=here, head=head, n=n):
            return tensors if whole else [x[here, head : head + n] for x in tensors]

        def of_queries(*tensors, here=here, head=head, n=n):
            return tensors if whole else [x[here, head * group : (head + n) * group] for x in tensors]

        part = dataclasses.replace(
            problem, batch=problem.batch if problem.varlen else min(entries, batch - entry), heads=n * group, kv_heads=n
        )
        tensors = *of_queries(q), *of_keys(k, v), *of_queries(dout, dq), *of_keys(dk, dv)
        packed = launches.HOPPER_BACKWARD_ARGUMENTS.pack(
            *(value for x in tensors for value in launches.pack_tensor(x)),
            *launches.pack_shape(call._replace(problem=part), True),
            *(x.data_ptr() for x in of_queries(remainder, dremainder, oldest_carry, oldest_tile)),
            scratch.data_ptr(), error.data_ptr(),
        )  # fmt: skip
        blocks, tiles = part.batch * part.heads * head_blocks, part.batch * n * ceil_div(problem.keys, block_n)
        yield Launch("hopper_backward_begin", ceil_div(blocks, 8), packed)
        yield Launch("hopper_backward", min(tiles, launches.multiprocessors(problem.device)), packed)


@functools.cache
def error_flag(device: torch.device) -> torch.Tensor:
    """Where kernels on a device report a wait that ran out: pinned memory, which both sides see without a copy."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=True)


def raise_errors(device: torch.device) -> None:
    """RuntimeError if an earlier backward on this device gave up waiting for another block."""
    flag = error_flag(device)
    if flag.item():
        code = flag.item()
        flag.zero_()
        raise RuntimeError(f"an earlier backward on {device} gave up a wait (code {code}): its gradients are void")
