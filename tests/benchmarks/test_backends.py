"""Entries for pytest-benchmark: every backend that runs here on problems of a size for CI.

`pytest tests/benchmarks --benchmark-only`; `--benchmark-autosave` and `--benchmark-compare` hold runs against each other.
`sbk bench` is what measures with a cold L2 and in turns.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from sbkernels import registry
from sbkernels.bench import contenders, sets
from sbkernels.verify import inputs
from sbkernels.verify.run import problem_of, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "cpu": {
        "dense": (sets.attention(1, 2, 2, 128, 128, 32), torch.float32),
        "grouped": (sets.attention(1, 4, 2, 100, 100, 32), torch.float32),
        "packed": (sets.attention(1, 2, 2, 120, 120, 32, lengths=(50, 0, 1, 69)), torch.float32),
        "one query": (sets.attention(2, 4, 2, 1, 1024, 32), torch.float32),
    },
    "cuda": {
        "dense": (sets.attention(1, 16, 16, 1024, 1024, 128), torch.bfloat16),
        "grouped": (sets.attention(1, 16, 4, 1024, 1024, 64), torch.bfloat16),
        "packed": (sets.attention(1, 16, 16, 1500, 1500, 64, lengths=(500, 0, 1, 999)), torch.bfloat16),
        "one query": (sets.attention(4, 32, 8, 1, 8192, 128), torch.bfloat16),
    },
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES[DEVICE])
@pytest.mark.parametrize("name", registry.names())
def test_backend(benchmark, name, case, direction):
    backend, reason = registry.try_load(name)
    if backend is None:
        pytest.skip(reason)
    x = inputs.make(*CASES[DEVICE][case], DEVICE)
    problem = problem_of(x)
    reason = why_not(backend, "", problem) or backend.slow(problem)
    if reason:
        pytest.skip(reason)
    function = contenders.ours(x, backend)[direction]

    def measured():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(measured)
