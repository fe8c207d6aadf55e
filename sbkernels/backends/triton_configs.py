"""Configs of the Triton backend and the default for each kind of problem."""

from __future__ import annotations

import dataclasses

from ..problem import Problem
from ..triton_kernels import step


@dataclasses.dataclass(frozen=True)
class TritonForward:
    """Tile sizes and launch options of the forward kernel; SKIP_FIRST: key tiles up to the first look at the sticks."""

    BLOCK_M: int
    BLOCK_N: int
    NUM_WARPS: int
    NUM_STAGES: int
    SKIP_FIRST: int = 4
    LOG_SPACE: bool = False


@dataclasses.dataclass(frozen=True)
class TritonBackward:
    """Tile sizes shared by the two backward kernels, and each one's launch options (queries: dq; keys: dk and dv).

    BLOCK_N must be the forward's: what it saved counts in its tiles. KEYS_RECOMPUTE and KEYS_TRANSPOSED: see
    logit_gradient in triton_kernels/step.py and add_product in triton_kernels/backward_keys.py.
    """

    BLOCK_M: int
    BLOCK_N: int
    QUERIES_NUM_WARPS: int
    QUERIES_NUM_STAGES: int
    KEYS_NUM_WARPS: int
    KEYS_NUM_STAGES: int
    KEYS_RECOMPUTE: bool = False
    KEYS_TRANSPOSED: bool = False
    LOG_SPACE: bool = False


def interpreting() -> bool:
    """Whether the kernels were defined under Triton's interpreter."""
    return step.INTERPRET.value


# Default configs, forward and backward, by largest head dim; every line compiles without spills for its architecture and its
# kind of problem, which tests/test_ahead_of_time.py holds it to. TIDY is the fastest of those measured on an H100 and leaves no
# register to spare: for it the lengths are multiples of the blocks, heads are not grouped and head dims are powers of two.
TIDY_SM90 = {
    64: (TritonForward(64, 64, 4, 3), TritonBackward(64, 64, 4, 3, 4, 3, KEYS_TRANSPOSED=True)),
    128: (TritonForward(64, 64, 4, 3), TritonBackward(64, 64, 4, 2, 4, 2, KEYS_RECOMPUTE=True, KEYS_TRANSPOSED=True)),
}
ROOMY_SM90 = {
    128: (TritonForward(64, 32, 4, 3), TritonBackward(64, 32, 4, 2, 4, 2, KEYS_RECOMPUTE=True, KEYS_TRANSPOSED=True)),
    256: (TritonForward(64, 32, 8, 2), TritonBackward(64, 32, 8, 2, 8, 2, KEYS_RECOMPUTE=True, KEYS_TRANSPOSED=True)),
}
ROOMY_SM80 = {
    128: (TritonForward(64, 32, 4, 3), TritonBackward(64, 32, 4, 2, 8, 2, KEYS_RECOMPUTE=True, KEYS_TRANSPOSED=True)),
    256: (TritonForward(64, 32, 8, 2), TritonBackward(64, 32, 8, 2, 8, 1, KEYS_RECOMPUTE=True)),
}
LOG_SPACE_SM80 = {128: (TritonForward(64, 32, 4, 1), ROOMY_SM80[128][1]), 256: ROOMY_SM80[256]}
# Rows that do not start on 16 bytes cannot be copied asynchronously, and Triton 3.6 then gives wgmma wrong descriptors of the
# tiles (seen at Dv = 50: wrong dk; with KEYS_NUM_STAGES = 1: shared addresses out of range). Products of 32 rows use mma.sync.
UNALIGNED_SM90 = {
    64: (TritonForward(32, 32, 2, 1), TritonBackward(32, 32, 2, 1, 2, 1)),
    128: (TritonForward(32, 32, 8, 1), TritonBackward(32, 32, 4, 1, 4, 1)),
    256: (TritonForward(32, 32, 8, 1), TritonBackward(32, 32, 8, 1, 8, 1)),
}
INTERPRETER_DEFAULTS = (TritonForward(32, 32, 4, 1), TritonBackward(32, 32, 4, 1, 4, 1))


def default_config(problem: Problem, capability: tuple[int, int], log_space: bool = False) -> TritonForward | TritonBackward:
    """The default for this problem on a GPU of this compute capability."""
    dims = (problem.head_dim, problem.value_dim)
    tidy = (
        capability >= (9, 0)
        and not (problem.varlen or log_space)
        and problem.group == 1
        and problem.queries % 64 == problem.keys % 64 == 0
        and all(dim in (16, 32, 64, 128) for dim in dims)
    )
    if capability < (9, 0):
        lines = LOG_SPACE_SM80 if log_space else ROOMY_SM80
    elif not problem.aligned:
        lines = UNALIGNED_SM90
    else:
        lines = TIDY_SM90 if tidy else ROOMY_SM90
    both = next(line for largest, line in lines.items() if max(dims) <= largest)
    if interpreting():
        both = INTERPRETER_DEFAULTS
    return dataclasses.replace(both[problem.direction == "backward"], LOG_SPACE=log_space)
