"""How often a difference is seen that is none, and how often one that was planted is: the figures of `sbk bench`'s verdicts.

`pytest tests/benchmarks/test_figures.py --benchmark-only -s`, some minutes on a CPU; without --benchmark-only nothing is run.
"""

import collections
import itertools
import os
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from sbkernels import registry
from sbkernels.bench import contenders, limits, regress, sets, timer
from sbkernels.verify import inputs

COMPARISONS, PROCESSES = 100, 15
SLOWDOWN = 0.03
EFFORT = timer.Effort(seconds=1e9, least=300, most=300)
CASE = sets.attention(1, 1, 1, 256, 256, 64)


def slower(function):
    """function, and SLOWDOWN of the time it took."""

    def run():
        begin = time.perf_counter_ns()
        function()
        until = time.perf_counter_ns() + (time.perf_counter_ns() - begin) * SLOWDOWN
        while time.perf_counter_ns() < until:
            pass

    return run


def words(verdicts) -> dict[str, int]:
    counted = collections.Counter(verdict.word for verdict in verdicts)
    return {word: counted[word] for word in regress.WORDS}


def test_contenders_in_turns(benchmark):
    """torch's backend, the same again, and the same with 3 % of what the call just took spent waiting behind it."""
    if not benchmark.enabled:
        pytest.skip("times are taken with --benchmark-only")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = inputs.make(CASE, torch.float32, "cpu")
    one, same, other = (contenders.ours(x, registry.load("torch"))["forward"] for _ in range(3))
    functions = {"one": one, "same": same, "slower": slower(other)}
    _, canary = limits.canary("cpu")
    measure = lambda: [timer.measure(functions, "cpu", effort=EFFORT, canary=canary) for _ in range(COMPARISONS)]  # noqa: E731
    runs = benchmark.pedantic(measure, rounds=1, iterations=1)
    torch.set_num_threads(threads)
    alarms = words(regress.in_turns(run["one"].samples, run["same"].samples) for run in runs)
    found = words(regress.in_turns(run["one"].samples, run["slower"].samples) for run in runs)
    print(f"\n{COMPARISONS} comparisons in turns, {EFFORT.least} samples: one backend with itself {alarms}")
    print(f"{SLOWDOWN:.0%} planted {found}")
    assert alarms["SLOWER"] + alarms["FASTER"] < 0.01 * COMPARISONS
    assert found["SLOWER"] >= 0.95 * COMPARISONS


def test_runs_against_each_other(benchmark, tmp_path):
    """`sbk bench` in PROCESSES processes, each held against each. Slowdowns are planted in the samples of one of two."""
    if not benchmark.enabled:
        pytest.skip("times are taken with --benchmark-only")
    paths = [tmp_path / f"{i}.json" for i in range(PROCESSES)]

    def measure():
        for path in paths:
            words = ("--device", "cpu", "--backend", "torch", "--beside", "none", "--case", "4 heads", "--case", "decoder")
            command = [sys.executable, "-m", "sbkernels", "bench", *words, "--json", str(path)]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)

    benchmark.pedantic(measure, rounds=1, iterations=1)
    records = [regress.load(path) for path in paths]
    print()
    counted = {}
    for slowdown in (0.0, SLOWDOWN, 0.10, 0.20):
        verdicts = []
        for old, new in itertools.combinations(records, 2):
            rows = [row | {"samples": [ms * (1 + slowdown) for ms in row["samples"]]} for row in new["rows"]]
            verdicts += [verdict for _, verdict in regress.against(old, new | {"rows": rows})]
        counted[slowdown] = words(verdicts)
        print(f"{len(verdicts)} comparisons of {PROCESSES} runs, {slowdown:.0%} planted: {counted[slowdown]}")
    assert counted[0.0]["SLOWER"] < 0.01 * len(verdicts)
