"""What a machine can do at most, measured on it, and what a problem asks of it: the roofline with special functions.

A problem's least work: products of the causal half (two forward, five backward); one special function a logit forward (the
exponential: what a tile's reciprocals add goes to zero as they are shared) and two backward (and beta's reciprocal); every
operand read and every result written once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..problem import Problem
from ..verify import inputs
from ..verify.run import problem_of
from . import timer
from .contenders import stickbreaking

GPU_MATMUL, CPU_MATMUL = 8192, 1024
GPU_COPY, CPU_COPY = 2**30, 2**26  # bytes: more than any cache
CPU_SPECIAL = 2**14  # numbers: they stay in the first caches
SPECIAL = {"forward": 1, "decode": 1, "backward": 2}  # functions a logit
TENSOR, SPECIAL_FUNCTION, MEMORY = "tensor", "special function", "memory"
# B, H, N, D of the canary: a mix of products, special functions and memory, as what is timed; it does not change with our kernels.
GPU_CANARY, CPU_CANARY = (1, 16, 512, 64), (1, 1, 192, 64)


@dataclasses.dataclass(frozen=True)
class Limits:
    """TFLOP/s of products, 10^9 special functions and 10^9 bytes a second; None where it could not be measured, see note."""

    tensor_tflops: float
    special_function_gops: float | None
    memory_gbs: float
    note: str = ""

    def least_ms(self, work: Work) -> tuple[float, str]:
        """The least milliseconds for some work, and which limit says so."""
        times = {TENSOR: work.flops / self.tensor_tflops / 1e9, MEMORY: work.bytes / self.memory_gbs / 1e6}
        if self.special_function_gops:
            times[SPECIAL_FUNCTION] = work.special / self.special_function_gops / 1e6
        name = max(times, key=times.get)
        return times[name], name


@dataclasses.dataclass(frozen=True)
class Work:
    """The least a problem asks for: floating-point operations of products, special functions, bytes."""

    flops: float
    special: float
    bytes: float


def work(x: inputs.Inputs, direction: str) -> Work:
    """Of one pass of attention."""
    problem, case = problem_of(x), x.case
    backward = direction == "backward"
    parts = sequences(problem, case.lengths)
    flops = sum((part.reversed() if backward else part).flops() for part in parts)
    logits = sum(part.batch * part.heads * part.visible_logits() for part in parts)
    once = [x.q, x.k, x.v, x.dout, x.dremainder]  # out and remainder are as large as their gradients
    # Backward: gradients of q, k and v are written, and what is left of the sticks is read, which the forward has saved.
    more = [x.q, x.k, x.v, x.dremainder] if backward else []
    return Work(flops, SPECIAL[direction] * logits, sum(t.numel() * t.element_size() for t in once + more))


def sequences(problem: Problem, lengths: tuple[int, ...]) -> list[Problem]:
    """A dense problem for each sequence; the problem itself where it is dense."""
    return [dataclasses.replace(problem, batch=1, queries=n, keys=n) for n in lengths] or [problem]


def measure(device: str, dtype: torch.dtype) -> Limits:
    """The machine's limits, products of square matrices of this dtype."""
    on_gpu = device.startswith("cuda")
    size, copied = (GPU_MATMUL, GPU_COPY) if on_gpu else (CPU_MATMUL, CPU_COPY)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    source, target = (torch.empty(copied, dtype=torch.int8, device=device) for _ in range(2))
    loads, note, count = {TENSOR: lambda: torch.mm(a, b), MEMORY: lambda: target.copy_(source)}, "", 0
    try:
        count, loads[SPECIAL_FUNCTION] = special_load(device)
    except ImportError as error:
        note = f"special functions are not measured: {error}"
    with timer.own_stream(device):  # which also makes the device current, for Triton
        times = {name: timing.median for name, timing in timer.measure(loads, device).items()}
    gops = count / times[SPECIAL_FUNCTION] / 1e6 if SPECIAL_FUNCTION in times else None
    return Limits(2 * size**3 / times[TENSOR] / 1e9, gops, 2 * copied / times[MEMORY] / 1e6, note)


def special_load(device: str) -> tuple[int, Callable]:
    """(special functions, function that does them). ImportError on a GPU without Triton."""
    if not device.startswith("cuda"):
        x, out = torch.rand(CPU_SPECIAL), torch.empty(CPU_SPECIAL)
        return CPU_SPECIAL, lambda: torch.exp2(x, out=out)
    from . import special

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(special.PROGRAMS_PER_SM * special.BLOCK * multiprocessors, device=device)
    return special.load(out, multiprocessors)


def canary(device: str) -> tuple[str, Callable]:
    """(what it is, function) of a fixed workload that is timed beside everything: where it differs, the machine does."""
    shape = GPU_CANARY if device.startswith("cuda") else CPU_CANARY
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    x = inputs.make(inputs.Case("alive", shape[0], shape[1], shape[1], shape[2], shape[2], shape[3], shape[3]), dtype, device)
    B, H, N, D = shape
    return f"stick-breaking in plain torch, forward, B={B} H={H} N={N} D={D} {str(dtype)[6:]}", lambda: stickbreaking(x.q, x.k, x.v)
