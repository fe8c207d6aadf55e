"""Plans the launches of csrc's Hopper kernels, which load through tensor maps, multiply by warpgroups and, backward, chain the
key tiles of a query block. What they do not cover takes the portable kernels.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from .. import env
from ..problem import Problem
from . import launches
from .base import Call, allocate
from .launches import CudaForward, Launch, ceil_div

CAPABILITY = (9, 0)
BLOCK_M, BLOCK_N = 64, 128  # of the backward
HEAD_DIMS = (64, 128)


def not_covered(problem: Problem) -> str | None:
    """Why the Hopper kernels do not run a problem; None if they do."""
    capability = torch.cuda.get_device_capability(problem.device)
    if capability != CAPABILITY:
        return f"needs compute capability 9.0, {problem.device} has {'.'.join(map(str, capability))}"
    if problem.varlen:
        return "takes sequences of one length"
    if problem.head_dim != problem.value_dim or problem.head_dim not in HEAD_DIMS:
        return f"takes equal head dims of 64 or 128, not {problem.head_dim} and {problem.value_dim}"
    if problem.queries != problem.keys or problem.keys % BLOCK_N:
        return f"takes as many queries as keys, a multiple of {BLOCK_N}, not {problem.queries} and {problem.keys}"
    if not problem.aligned:
        return "takes rows that start on multiples of 16 bytes"
    return None


def mappable(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, N, D], or a dense copy where a tensor map cannot say its strides (csrc/tensor_map.cpp, fold)."""
    batch, heads, _, width = x.shape
    stride_b, stride_h, stride_row, last = x.stride()
    steps = last == 1 and x.data_ptr() % 16 == 0 and stride_row % 8 == stride_h % 8 == stride_b % 8 == 0 < min(stride_b, stride_h)
    folds = batch == 1 or heads == 1 or stride_b == heads * stride_h or stride_h == width
    return x if steps and folds else x.contiguous()


def mapped(call: Call) -> Call:
    """The call with tensors that maps can address."""
    q, k, v = mappable(call.q), mappable(call.k), mappable(call.v)
    return call if q is call.q and k is call.k and v is call.v else call._replace(q=q, k=k, v=v)


class PreparedForward(launches.PreparedForward):
    """Of inputs that tensor maps can address, and blocks that share the query blocks out by a ticket."""

    def params(self, call: Call, out, remainder, oldest_carry, oldest_tile) -> bytes:
        ticket = allocate((1,), remainder, torch.int32)
        return super().params(mapped(call), out, remainder, oldest_carry, oldest_tile, ticket)


def prepare_forward(call: Call, kernel, config: CudaForward, out) -> PreparedForward:
    """The launch that calls of this kind share: at most a block a multiprocessor."""
    grid = min(launches.query_blocks(call.problem, config), launches.multiprocessors(call.problem.device))
    return PreparedForward(kernel, grid, *launches.pack_forward(mapped(call), out))


def plan_backward(call: Call, scratch_bytes, remainder, oldest_carry, oldest_tile, dout, dremainder, dq, dk, dv):
    """The backward's launches, for as many batch entries at a time as the workspace has scratch for, at least one.

    scratch_bytes(rows, head_dim): what so many rows of all heads take.
    """
    problem, error = call.problem, error_flag(call.q.device)
    rows = problem.heads * problem.queries
    entries = min(problem.batch, max(1, env.workspace() // scratch_bytes(rows, problem.head_dim)))
    scratch = allocate((ceil_div(scratch_bytes(entries * rows, problem.head_dim), 4),), remainder, torch.int32)
    tensors = (*(mappable(x) for x in (call.q, call.k, call.v, dout)), dq, dk, dv)
    for first in range(0, problem.batch, entries):
        here = slice(first, first + entries)
        part = call._replace(problem=dataclasses.replace(problem, batch=min(entries, problem.batch - first)))
        packed = launches.HOPPER_BACKWARD_ARGUMENTS.pack(
            *(value for x in tensors for value in launches.pack_tensor(x[here])),
            *launches.pack_shape(part, True),
            *(x[here].data_ptr() for x in (remainder, dremainder, oldest_carry, oldest_tile)),
            scratch.data_ptr(), error.data_ptr(),
        )  # fmt: skip
        blocks = part.problem.batch * problem.heads * problem.queries // BLOCK_M
        yield Launch("hopper_backward_begin", ceil_div(blocks, 8), packed)
        yield Launch("hopper_backward", part.problem.batch * problem.kv_heads * problem.keys // BLOCK_N, packed)
        yield Launch("hopper_backward_end", blocks, packed)


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
