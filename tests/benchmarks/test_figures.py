"""How often a difference is seen that is none, and how often one that was planted is: the figures of `sbk bench`'s comparisons.

`pytest tests/benchmarks/test_figures.py --benchmark-only -s`, some minutes; without --benchmark-only nothing is run. Contenders
are torch's backend, the same again, and the same with 3 % of what the call just took spent waiting behind it. They take turns
with the canary, so that the same samples give comparisons in turns and, cut into blocks that lie apart in time, of two runs.
"""

import collections
import time

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from sbkernels import registry
from sbkernels.bench import contenders, limits, regress, sets, timer
from sbkernels.verify import inputs

COMPARISONS = 100
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


def test_false_alarms_and_planted_slowdowns(benchmark):
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

    def between(name):
        """Each run with the one half of all later."""
        pairs = [(runs[i]["one"], runs[(i + COMPARISONS // 2) % COMPARISONS][name]) for i in range(COMPARISONS)]
        samples = [[regress.Samples(timing.samples, timing.beside) for timing in pair] for pair in pairs]
        return words(regress.two_runs(*pair, "cpu") for pair in samples)

    apart = between("same")
    print(f"of two runs: one backend with itself {apart}\n{SLOWDOWN:.0%} planted {between('slower')}")
    assert alarms["SLOWER"] + alarms["FASTER"] < 0.01 * COMPARISONS
    assert found["SLOWER"] >= 0.95 * COMPARISONS
    assert apart["SLOWER"] + apart["FASTER"] <= 0.01 * COMPARISONS
