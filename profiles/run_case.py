"""One case for a profiler to watch: warmed up outside of an NVTX range and of the profiler's, then run once inside both.

python -m sbkernels.profiles.run_case CASE [--backend B] [--direction forward] [--dtype float16] [--device cuda:0]
"""

from __future__ import annotations

import argparse
import contextlib

import torch

from .. import dispatch
from ..cli.shared import check_device
from ..problem import DTYPES, Problem
from ..tuning.tune import DIRECTIONS
from ..verify import calls, inputs
from . import cases
from .counters import RANGE

WARMUP_CALLS = 3  # compiles, loads, fills caches


def parser() -> argparse.ArgumentParser:
    """Options of a case; `sbk profile` hands them on."""
    made = argparse.ArgumentParser(prog="run_case", description="Run one case once, for a profiler to watch.")
    made.add_argument("case", metavar="CASE", help="a name, or a shape B,H,N,D")
    made.add_argument("--backend", help="default: what dispatch chooses")
    made.add_argument("--direction", choices=(*DIRECTIONS, "both"), default="both")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    made.add_argument("--device", default="cuda")
    return made


@contextlib.contextmanager
def watched(device: str):
    """What runs inside is in the range; on a CPU there is none."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    # From start to end it is the whole process's: autograd runs backwards in a thread of its own, where no pushed range holds.
    started = torch.cuda.nvtx.range_start(RANGE)
    yield
    torch.cuda.synchronize(device)
    torch.cuda.nvtx.range_end(started)
    torch.cuda.profiler.stop()


def run(problem: Problem, backend: str | None, directions: tuple[str, ...]) -> None:
    """The passes of a problem, on inputs whose stick lasts. BackendError where no backend, or not this one, can run it."""
    sizes = (problem.batch, problem.heads, problem.kv_heads, problem.queries, problem.keys, problem.head_dim, problem.value_dim)
    x = inputs.make(inputs.Case("alive", *sizes), problem.torch_dtype, problem.device)
    with dispatch.use_backend(backend) if backend else contextlib.nullcontext():
        functions = calls.passes(x)
        for direction in directions * WARMUP_CALLS:
            functions[direction]()
        with watched(problem.device):
            for direction in directions:
                functions[direction]()


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    arguments = parser().parse_args(argv)
    problem = cases.problem(arguments.case, arguments.dtype, check_device(arguments.device))
    run(problem, arguments.backend, DIRECTIONS if arguments.direction == "both" else (arguments.direction,))


if __name__ == "__main__":
    main()
