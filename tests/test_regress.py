"""Verdicts on samples that were made up; tests/benchmarks has the figures of measured ones."""

import dataclasses
import math
import random

from sbkernels.bench import regress

COMPARISONS = 400


def planted_runs(seed: int, slowdown: float, same_turns: bool, count: int = 300) -> tuple[regress.Samples, regress.Samples]:
    """Samples of two contenders on a machine with two modes 20 % apart, a drift, a heavy tail, and a scatter of 4 %."""
    draw = random.Random(seed)

    def machine():
        mode, drift = draw.choice((1.0, 1.2)), draw.uniform(-0.03, 0.03)
        for turn in range(count):
            if draw.random() < 0.005:
                mode = 2.2 - mode
            yield mode * (1 + drift * turn / count)

    def noisy(ms):
        return ms * math.exp(draw.gauss(0, 0.04) + (draw.expovariate(3) if draw.random() < 0.05 else 0))

    factors = list(machine())
    others = factors if same_turns else list(machine())
    canary = tuple(map(noisy, factors))
    old = regress.Samples(tuple(noisy(3 * f) for f in factors), canary)
    new = tuple(noisy(3 * slowdown * f) for f in others)
    return old, regress.Samples(new, canary if same_turns else tuple(map(noisy, others)))


def words(slowdown: float, same_turns: bool) -> dict[str, float]:
    """Shares of verdicts over COMPARISONS comparisons of planted samples."""
    found = []
    for seed in range(COMPARISONS):
        old, new = planted_runs(seed, slowdown, same_turns)
        found.append((regress.in_turns(old.ms, new.ms) if same_turns else regress.two_runs(old, new, "cpu")).word)
    return {word: found.count(word) / COMPARISONS for word in regress.WORDS}


def test_planted_samples_are_told_apart():
    """Samples that were made up; tests/benchmarks has the figures of measured ones."""
    same, slower, faster = words(1.0, True), words(1.03, True), words(1 / 1.03, True)
    print(f"\nsame turns, {COMPARISONS} comparisons: no slowdown {same}\n3 % slower {slower}\n3 % faster {faster}")
    assert same["SLOWER"] + same["FASTER"] < 0.01
    assert slower["SLOWER"] >= 0.95 and faster["FASTER"] >= 0.95
    same, slower = words(1.0, False), words(1.15, False)
    print(f"two runs: no slowdown {same}\n15 % slower {slower}")
    assert same["SLOWER"] + same["FASTER"] < 0.01 and slower["SLOWER"] > slower["FASTER"] == 0


def test_what_cannot_be_told_is_unsure():
    old, new = planted_runs(0, 1.0, False)
    few = regress.Samples(new.ms[:7], new.canary[:7])
    for verdict in (regress.two_runs(old, few, "cpu"), regress.in_turns(old.ms, few.ms)):
        assert verdict.word == "UNSURE" and "300 and 7 samples" in verdict.why
    moved = dataclasses.replace(new, canary=tuple(2 * ms for ms in new.canary))
    assert regress.two_runs(old, moved, "cpu").word == "UNSURE" and "canary" in regress.two_runs(old, moved, "cpu").why
    slow = dataclasses.replace(old, ms=tuple(2 * ms for ms in old.ms))
    assert regress.two_runs(old, slow, "cpu").word == "SLOWER" and regress.two_runs(slow, old, "cuda").word == "FASTER"
