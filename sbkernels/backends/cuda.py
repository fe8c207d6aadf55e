"""The CUDA backend: the kernels of csrc, compiled by nvcc when sbkernels was installed, launched through sbkernels._C.

The extension knows nothing of torch: it takes packed parameters, raw pointers in them, and a stream.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from ..problem import Problem
from ..sources import kernel_sources
from . import hopper, launches
from .base import Call
from .launches import DTYPES, CudaBackward, CudaForward, KernelBackend, PreparedForward, current_stream

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
        width = compiled_width(problem)
        instance = INSTANCES.get(_key(kernel, problem.dtype, width, config.of(kernel)))
        if instance is None:
            return f"{kernel} with {config.of(kernel)} is not among the kernels that were compiled for D up to {width}"
        return instance[1]

    def config_pairs(self, problem: Problem):
        return _config_pairs(compiled_width(problem))

    def default_config(self, problem: Problem):
        pair = _hopper_pair(compiled_width(problem))
        if pair and hopper.not_covered(problem) is None:
            return pair[0 if problem.direction == "forward" else 1]
        return super().default_config(problem)

    def config_space(self, problem: Problem):
        pair, index = _hopper_pair(compiled_width(problem)), 0 if problem.direction == "forward" else 1
        return [*([pair[index]] if pair else []), *super().config_space(problem)]

    def mismatch(self, forward: CudaForward, backward: CudaBackward) -> str | None:
        # A portable backward goes with Hopper's forward too, in whose tiles it counts.
        return super().mismatch(dataclasses.replace(forward, HOPPER=forward.HOPPER and backward.HOPPER), backward)

    def variants(self, problem: Problem):
        return {} if self.unsupported(problem) else {"portable": super().default_config(problem)}

    def illegal(self, problem: Problem, config) -> str | None:
        if config.HOPPER:
            reason = hopper.not_covered(problem)
            if reason is None and config != _hopper_config(compiled_width(problem), problem.direction):
                reason = "was not compiled"
            return reason and f"the Hopper kernel {reason}"
        return super().illegal(problem, config)

    def kernels(self, problem: Problem, config) -> str | None:
        if config.HOPPER:
            return "Hopper's"
        best = _hopper_config(compiled_width(problem), problem.direction)
        reason = hopper.not_covered(problem) or ("was not compiled" if best is None else None)
        return f"portable: the Hopper kernel {reason}" if reason else "portable: the config says so"

    def prepare_forward(self, call: Call, config: CudaForward, out) -> PreparedForward:
        if not config.HOPPER:
            return super().prepare_forward(call, config, out)
        return hopper.prepare_forward(call, self.kernel(call, "hopper_forward", config), config, out)

    def backward(self, call: Call, config: CudaBackward, remainder, saved, dout, dremainder):
        if not config.HOPPER:
            return super().backward(call, config, remainder, saved, dout, dremainder)
        hopper.raise_errors(call.q.device)
        dq, dk, dv = (call.empty_gradient(x) for x in (call.q, call.k, call.v))
        arguments = (remainder, *saved, dout, dremainder.contiguous(), dq, dk, dv)
        width = compiled_width(call.problem)
        block_n = _hopper_config(width, "forward").BLOCK_N
        scratch_bytes = functools.partial(_C.hopper_backward_scratch, head_dim=width)
        for launch in hopper.plan_backward(call, block_n, scratch_bytes, *arguments):
            self.launch(self.kernel(call, launch.kernel, config), launch.grid, launch.params, call.q.device.index)
        return dq, dk, dv

    def sources(self):
        return [__file__, hopper.__file__, launches.__file__, *kernel_sources()]

    def versions(self):
        return {"cuda kernels": f"{len(INSTANCES)} compiled{', SBKERNELS_CHECKED' if _C.CHECKED else ''}"}

    def kernel(self, call: Call, kernel: str, config) -> int:
        """Its number among INSTANCES."""
        return INSTANCES[_key(kernel, call.problem.dtype, compiled_width(call.problem), config.of(kernel))][0]

    def launch(self, kernel: int, grid: int, params: bytes, device: int) -> None:
        _C.launch(kernel, grid, params, current_stream(device), device)


def compiled_width(problem: Problem) -> int:
    """The compiled BLOCK_D that holds D and Dv."""
    return _compiled_width(max(problem.head_dim, problem.value_dim))


@functools.cache
def _compiled_width(head_dim: int) -> int:
    return next(width for width in WIDTHS if width >= head_dim)


@functools.cache
def _hopper_config(width: int, direction: str) -> CudaForward | CudaBackward | None:
    """The config of the Hopper kernels of a width, if they were compiled."""
    for it in _C.instances():
        if it["kernel"] == f"hopper_{direction}" and it["block_d"] == width:
            return CudaForward(**it["config"], HOPPER=True) if direction == "forward" else CudaBackward(HOPPER=True)
    return None


@functools.cache
def _hopper_pair(width: int) -> tuple[CudaForward, CudaBackward] | None:
    """A width's Hopper configs, if compiled."""
    forward, backward = (_hopper_config(width, direction) for direction in ("forward", "backward"))
    return None if forward is None else (forward, backward)


@functools.cache
def _portable(width: int) -> tuple[list[CudaForward], list[CudaBackward]]:
    """Configs of the portable kernels of a width, in the table's order."""
    table = {}
    for it in _C.instances():
        if it["block_d"] == width and it["dtype"] == DTYPES[0]:
            table.setdefault(it["kernel"], []).append(it["config"])
    backwards = []
    for queries, keys in itertools.product(table["backward_queries"], table["backward_keys"]):
        if queries["KEY_GROUP"] == keys["KEY_GROUP"]:
            named = {f"QUERIES_{name}": value for name, value in queries.items() if name != "KEY_GROUP"}
            named |= {f"KEYS_{name}": value for name, value in keys.items() if name != "KEY_GROUP"}
            backwards.append(CudaBackward(KEY_GROUP=keys["KEY_GROUP"], **named))
    return [CudaForward(**forward) for forward in table["forward"]], backwards


@functools.cache
def _config_pairs(width: int) -> list[tuple[CudaForward, CudaBackward]]:
    """All combinations of portable kernels that go together."""
    return [pair for pair in itertools.product(*_portable(width)) if pair[0].BLOCK_N == pair[1].QUERIES_BLOCK_N]
