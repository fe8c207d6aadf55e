"""Killable processes: what happens to an item is said of that item."""

import itertools
import os
import time

import pytest

from sbkernels import workers


def work(item, state):
    state.setdefault("seen", []).append(item)
    if item == "dies":
        os._exit(7)
    if item == "hangs":
        time.sleep(1000)
    if item == "is killed":
        os.kill(os.getpid(), 9)
    seen = list(state["seen"])
    return workers.Last(seen) if item == "retires" else seen


@pytest.mark.parametrize("processes", (1, 3))
def test_losses_are_named_and_cost_nothing_else(processes):
    groups = [["a", "b"], ["c", "dies", "d", "is killed", "e"], [], ["hangs"], ["f", "retires", "h"], ["hangs", "g"]]
    begin, found = time.monotonic(), []
    for item, result, lost in workers.run(work, groups, processes, deadline=6.0):
        assert (result is None) == (lost is not None)
        found.append((item, lost or result))
    assert sorted(item for item, _ in found) == sorted(itertools.chain(*groups))
    answers = dict(found)
    assert answers["b"] == ["a", "b"] and answers["c"] == ["c"]
    assert answers["d"] == ["d"] and answers["e"] == ["e"]  # what a dead process knew is gone
    assert answers["retires"] == ["f", "retires"] and answers["h"] == ["h"]
    assert answers["dies"] == "its process died with exit status 7"
    assert answers["is killed"] == "its process died with exit status -9"
    assert [lost for item, lost in found if item == "hangs"] == ["no result in 6 s: its process was killed"] * 2
    assert time.monotonic() - begin < 60


def test_leaving_early_kills_all():
    running = workers.run(work, [["a"], ["hangs"]], 2, deadline=100.0)
    assert next(running)[0] == "a"
    begin = time.monotonic()
    running.close()
    assert time.monotonic() - begin < 10


def test_nothing_to_do():
    assert list(workers.run(work, [[], []], 2, deadline=1.0)) == []
