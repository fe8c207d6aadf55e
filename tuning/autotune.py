"""SBKERNELS_AUTOTUNE=1: the first problem of its kind that no tuned config serves is tuned then and there.

In a process of its own, so that nothing of the caller's (its main module, its CUDA context, its random state) is touched. Never
while a CUDA graph is captured, and never in a job of several processes, whose ranks would each tune.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings

import torch

from .. import env
from ..problem import Problem

SECONDS = 60.0  # wall-time budget of a problem, and as much again for what its process needs besides
_tried: set[tuple[str, Problem]] = set()


def on_miss(backend, problem: Problem) -> bool:
    """Whether a backend's config for a problem may be looked up again; config.resolve calls this where no tuned one serves."""
    key = backend.name, problem
    if not env.autotune() or key in _tried or problem.empty or not problem.keys or backend.slow(problem):
        return False
    _tried.add(key)
    from . import install, ranks

    if ranks.world() > 1:
        warnings.warn(f"{env.AUTOTUNE}: not in a job of several processes; `torchrun -m sbkernels tune` before it", stacklevel=2)
        return False
    if problem.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    print(f"sbkernels: tuning {backend.name}: {problem} ({env.AUTOTUNE}=1)", file=sys.stderr)
    command = [sys.executable, "-m", __name__, backend.name, json.dumps(dataclasses.asdict(problem))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS)
        failure = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1] if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure is not None:
        warnings.warn(f"{env.AUTOTUNE}: {backend.name} was not tuned for {problem}: {failure}", stacklevel=2)
        return False
    install()
    return True


def main(name: str, fields: str) -> None:
    """Tune one problem, given as JSON of its fields, within SECONDS."""
    from .session import Session
    from .tune import Task, tune

    problem = Problem(**json.loads(fields))
    tune([Task(name, problem)], env.tuning_database(), Session(seconds=SECONDS), [problem.device])


if __name__ == "__main__":
    main(*sys.argv[1:])
