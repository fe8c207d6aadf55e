"""The tuner: bad configs are classified and never served, a killed run goes on, what is right and fastest is served.

Figures that were asked for are printed: run with -s.
"""

import collections
import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from planted import FAULTS, Planted, PlantedBackend

from sbkernels import registry
from sbkernels.config import to_dict
from sbkernels.problem import Problem
from sbkernels.tuning import benches, keys, lookup, problems, race, trial, tune
from sbkernels.tuning.session import Clock, Policy, Session
from sbkernels.tuning.store import Store
from sbkernels.tuning.tuner import Tuner, frozen

PROBLEM = Problem(1, 2, 2, 70, 70, 16, 16, "float32", "cpu")
DEADLINE = 5.0  # the first action also computes the reference


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Small problems on a machine that has other things to do: more threads would wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def planted(monkeypatch):
    """The planted backend, registered; its space is set by the test."""
    monkeypatch.setitem(registry.BACKENDS, "planted", "planted:PlantedBackend")
    monkeypatch.setattr(PlantedBackend, "space", ())
    yield registry.load("planted")
    registry.load.cache_clear()


class Timed(benches.Killable):
    """Keeps how much longer than its deadline a hung action took."""

    def __init__(self, deadline):
        super().__init__(deadline)
        self.overshoot = []

    def act(self, action, subject, argument=None):
        begin = time.monotonic()
        result = super().act(action, subject, argument)
        if result.status == "hung":
            self.overshoot.append(time.monotonic() - begin - DEADLINE)
        return result


def tuned(backend, store, bench, problem=PROBLEM, **options):
    return Tuner(backend, problem, Session(**options), store, bench).run()


def test_bad_configs_are_classified_and_none_is_served(planted, tmp_path):
    """60 of them, each kind; one that is fine and faster than the default among them."""
    faults = ["illegal access", "endless loop"] * 3 + ["raises"] * 6 + ["out of memory", "not compiled"] * 6
    rest = ["wrong tail", "stale", "nan", "writes beyond"]
    faults += list(itertools.islice(itertools.cycle(rest), 60 - len(faults)))
    PlantedBackend.space = [Planted(fault, i) for i, fault in enumerate(faults)] + [Planted("none", 99)]
    with Store(tmp_path / "t.db") as store, Timed(DEADLINE) as bench, benches.Compilers(1) as compilers:
        outcome = Tuner(planted, PROBLEM, Session(), store, bench, compilers=compilers).run()
        status = {
            trial.bodies["config"]["number"]: trial.status for trial in store.trials() if trial.bodies["config"]["fault"] != "none"
        }
    expected = collections.Counter(FAULTS[fault] for fault in faults)
    print(f"\n60 bad configs: {dict(outcome.failed)}, hangs overshot by at most {max(bench.overshoot):.2f} s")
    assert outcome.failed == expected and sum(expected.values()) == 60
    assert all(status[i] == FAULTS[fault] for i, fault in enumerate(faults))
    assert outcome.best["fault"] == "none" and len(bench.overshoot) == 3 and max(bench.overshoot) <= 2.0


def test_gradients_are_verified(planted):
    for fault, status in (("none", "ok"), ("wrong gradient", "wrong")):
        subject = trial.Subject("planted", PROBLEM.reversed(), frozen(Planted(fault)))
        assert trial.work(("verify", subject, 1), {}).status == trial.work(("check", subject, None), {}).status == status


def test_what_is_faster_is_found_and_served(planted, tmp_path, monkeypatch):
    """A default that sleeps: the one that does not is confirmed, and a lookup gives it; a slower one is dropped early."""
    monkeypatch.setattr(PlantedBackend, "default_config", lambda self, problem: Planted("none", 0, 5.0))
    PlantedBackend.space = [Planted("none", 1, 0.0), Planted("none", 2, 20.0)]
    with Store(tmp_path / "t.db") as store:
        bench = Direct()
        outcome = tuned(planted, store, bench)
        assert outcome.best == to_dict(Planted("none", 1)) and outcome.gain > 1.5
        samples = {t.bodies["config"]["number"]: len(t.details["samples"]) for t in store.trials() if t.status == "ok"}
        assert samples[2] == Policy().samples  # one turn was enough
    answer = lookup.Lookup(lambda: [("user", Store(tmp_path / "t.db"))])("planted", PROBLEM)
    assert answer.config == outcome.best and answer.ms == outcome.ms


class Direct:
    """A bench in this process."""

    def __init__(self):
        self.acts = []

    def act(self, action, subject, argument=None):
        self.acts.append((action, dict(subject.config)))
        return trial.work((action, subject, argument), {})


def test_a_tie_keeps_the_default_and_a_second_run_measures_nothing(planted, tmp_path):
    medians = {Planted("none", i): 1.0 for i in range(4)} | {Planted("none", 9): 2.0}
    PlantedBackend.space = list(medians)
    bench = benches.Recorded({trial.Subject("planted", PROBLEM, frozen(c)): ms for c, ms in medians.items()})
    with Store(tmp_path / "t.db") as store:
        outcome = tuned(planted, store, bench)
        assert outcome.best == to_dict(Planted()) and outcome.gain == 1.0 and len(outcome.ties) == 3
        count = store.count()
        again = tuned(planted, store, bench)
        assert store.count() == count and (again.tried, again.known) == (0, 5)
        assert (again.best, again.ms, again.ties) == (outcome.best, outcome.ms, outcome.ties)


def test_neighbours_say_where_to_begin(planted, tmp_path):
    """What was fastest at the nearest other sizes is tried first; nothing is asked of the problem's own trials."""
    medians = {Planted("none", i): ms for i, ms in enumerate((4.0, 3.0, 1.0, 2.0))}
    PlantedBackend.space = list(medians)
    sizes = {n: dataclasses.replace(PROBLEM, queries=n, keys=n) for n in (70, 100, 400)}
    bench = benches.Recorded({trial.Subject("planted", p, frozen(c)): ms for p in sizes.values() for c, ms in medians.items()})
    with Store(tmp_path / "t.db") as store:
        assert Tuner(planted, sizes[70], Session(), store, bench)._hints() == []
        for n in (100, 400):
            tuned(planted, store, bench, sizes[n])
        assert Tuner(planted, sizes[70], Session(), store, bench)._hints() == [2, 3, 1, 0]
        tuned(planted, store, bench, sizes[70])
        numbers = [t.bodies["config"]["number"] for t in store.trials(problem=keys.problem(sizes[70])) if t.status == "ok"]
        assert numbers == [0, 2, 3, 1]


def test_a_default_that_fails_ends_the_search(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(PlantedBackend, "default_config", lambda self, problem: Planted("raises"))
    PlantedBackend.space = [Planted("none", 1)]
    with Store(tmp_path / "t.db") as store:
        outcome = tuned(planted, store, Direct())
    assert outcome.best is None and outcome.why == "the default config: crashed"


def test_what_was_right_once_is_verified_again(planted, tmp_path, monkeypatch):
    """A config that turns wrong after it was timed is found out before it is confirmed."""
    PlantedBackend.space = [Planted("none", 1)]
    fast = {trial.Subject("planted", PROBLEM, frozen(Planted("none", i))): ms for i, ms in ((0, 2.0), (1, 1.0))}

    class TurnsWrong(benches.Recorded):
        def act(self, action, subject, argument=None):
            if action == "verify" and argument == 2 and dict(subject.config)["number"] == 1:
                return trial.Result("wrong", "planted")
            return super().act(action, subject, argument)

    with Store(tmp_path / "t.db") as store:
        outcome = tuned(planted, store, TurnsWrong(fast))
        assert outcome.best == to_dict(Planted()) and outcome.failed == {"wrong": 1}
        assert lookup.Lookup(lambda: [("user", Store(tmp_path / "t.db"))])("planted", PROBLEM).config == to_dict(Planted())


KILLS, CONFIGS = 50, 400


def test_kills_lose_one_trial_at_most(tmp_path):
    """SIGKILL at random points, until all is measured: what was begun and is not stored is at most one trial a kill."""
    path, begun = tmp_path / "t.db", tmp_path / "begun"
    backend = registry.load("torch")
    space = [(("BLOCK_M", 16 * i), ("BLOCK_N", 64), ("HEADS", 1)) for i in range(1, CONFIGS + 1)]

    class Slow(benches.Recorded):
        def act(self, action, subject, argument=None):
            if action == "verify":
                with open(begun, "a") as file:
                    file.write(json.dumps(dict(subject.config)) + "\n")
            time.sleep(0.001)
            return super().act(action, subject, argument)

    def run():
        bench = Slow({trial.Subject("torch", PROBLEM, config): 1.0 + i for i, config in enumerate(space)})
        with Store(path) as store:
            tuner = Tuner(backend, PROBLEM, Session(), store, bench)
            tuner.space, tuner.default = space, space[0]
            tuner.run()

    generator, kills = random.Random(0), 0
    Store(path).close()
    while kills < KILLS:
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        time.sleep(generator.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            break
    run()
    with Store(path) as store:
        stored = collections.Counter(keys.canonical(t.bodies["config"]) for t in store.trials() if t.status == "ok")
    lost = len(begun.read_text().splitlines()) - len(stored)
    print(f"\n{kills} kills: {lost} trials lost, {sum(stored.values()) - len(stored)} measured twice")
    assert kills == KILLS and len(stored) == CONFIGS and set(stored.values()) == {1} and lost <= kills + 1


def test_noise_and_races():
    canary = [1.0, 1.001, 0.999, 1.3, 1.002]
    assert race.quiet(canary) == [0, 1, 2, 4]
    assert race.behind([2.0] * 5, [1.0] * 5) and not race.behind([1.0, 2.0, 1.0, 2.0, 1.0], [1.0] * 5)
    assert race.known([1.0, 1.001, 1.002]) and not race.known([1.0, 1.1, 1.2])


def test_a_budget_is_kept_and_shared():
    clock = Clock(10.0)
    part = clock.part(0.5)
    assert 4.9 < part.left() <= 5.0 < clock.left()
    clock.stop()
    assert part.left() == float("-inf") and Clock().left() == float("inf")


@pytest.mark.parametrize("problem", [
    PROBLEM, dataclasses.replace(PROBLEM, queries=3, kv_heads=1, layout="bnhd", attend_current=True, skip=False),
    Problem(3, 4, 2, 40, 40, 16, 24, "float32", "cpu", "thd", True, 61),
])  # fmt: skip
def test_configs_are_verified_and_timed_on_what_was_asked(problem):
    """The inputs that are timed are of the problem; those that are verified are of the problem that was compiled for."""
    from sbkernels.verify.run import problem_of

    x = trial.timed_inputs(problem)
    assert dataclasses.replace(problem_of(x), layout=problem.layout) == problem
    for length in trial.LENGTHS:
        small = trial.small_problem(problem, length)
        x, _ = trial.small_inputs(small, 1)
        assert dataclasses.replace(problem_of(x), layout=problem.layout) == small and small.keys == length
    default = frozen(registry.load("torch").default_config(problem))
    for p in (problem, problem.reversed()):
        for action, argument in (("verify", 1), ("time", (2, default)), ("check", None)):
            result = trial.work((action, trial.Subject("torch", p, default), argument), {})
            assert result.status == "ok", result


def test_tune_one_backend_on_this_machine(tmp_path):
    """End to end, in processes: the torch backend, both directions, and what cannot be tuned here is said."""
    wanted, missing = tune.tasks([PROBLEM], ("torch", "cuda"))
    assert [task.problem.direction for task in wanted] == ["forward", "backward"]
    if not torch.cuda.is_available():
        assert "cuda" in missing
    path = tmp_path / "t.db"
    outcomes = tune.tune(wanted, path, Session(seconds=8.0), ["cpu"])
    assert [outcome.best is not None for outcome in outcomes] == [True, True]
    with Store(path) as store:
        confirmed = [t for t in store.trials() if t.status == "confirmed"]
        assert len(confirmed) == 2 and not store.faults()
        assert all(t.details["session"]["seconds"] == 8.0 and t.details["default_ms"] >= t.median for t in confirmed)


def test_problems_of_a_command_line():
    assert problems.parse("1,8/2,128/4096,64/80", "float32", "cpu", skip=False) == Problem(
        1, 8, 2, 128, 4096, 64, 80, "float32", "cpu", skip=False
    )
    assert not problems.parse("1,2,64,50", "bfloat16", "cpu").aligned
    for text in ("1,2,3", "1,2,x,4", "1,3/2,64,64", "1,2,64/32,64", "1/2,2,64,64", "0,2,64,64", "1,2,64,512"):
        with pytest.raises(ValueError, match="expected B,H,N,D"):
            problems.parse(text, "float32", "cpu")


RANKS = """
import sys
from sbkernels.problem import Problem
from sbkernels.tuning import ranks, tune
from sbkernels.tuning.session import Session
import pathlib
found = [Problem(1, 1, 1, n, n, 16, 16, "float32", "cpu") for n in (16, 32)]
wanted, _ = tune.tasks(found, ("torch",), ("forward",))
if __name__ == "__main__":
    ranks.tune(wanted, pathlib.Path(sys.argv[1]), Session(seconds=8.0), ["cpu"])
"""


def test_ranks_share_the_work_and_have_all_of_it(tmp_path):
    """Two processes of torchrun's kind, gloo: each tunes one problem, the database has both."""
    script, path = tmp_path / "job.py", tmp_path / "t.db"
    script.write_text(RANKS)
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen([sys.executable, script, path], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    with Store(path) as store:
        confirmed = [t.bodies["problem"]["sizes"]["keys"] for t in store.trials() if t.status == "confirmed"]
    assert sorted(confirmed) == [16, 32]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
