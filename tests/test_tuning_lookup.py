"""Which tuned config is served: tiers, neighbours, ties, legality; and what dispatch and `sbk explain` make of it."""

import collections
import dataclasses
import itertools
import json
import random
import shutil
import threading
import time
import timeit
import warnings

import pytest
import torch
from planted import damaged

from sbkernels import config as configs
from sbkernels import dispatch, env, registry, stickbreaking_attention, tuning
from sbkernels.problem import Problem
from sbkernels.tuning import keys, store
from sbkernels.tuning.lookup import Lookup, octaves, same_architecture
from sbkernels.tuning.store import Store

PROBLEM = Problem(1, 8, 8, 512, 512, 64, 64, "float32", "cpu")
CONFIG = {"BLOCK_M": 64, "BLOCK_N": 64, "HEADS": 1}


@pytest.fixture
def planted(tmp_path):
    """planted(ms, problem=..., config=..., origin=..., status=..., machine=...): one trial; planted.lookup() over both."""
    paths = {name: tmp_path / f"{name}.db" for name in ("user", "shipped")}
    backend = registry.load("torch")

    def add(ms, problem=PROBLEM, config=CONFIG, origin="user", status="confirmed", **changed):
        parts = {
            "machine": keys.machine("cpu"), "toolchain": keys.toolchain(backend, "cpu"),
            "kernel": keys.kernel(backend, problem.direction), "problem": keys.problem(problem), "config": config,
        }  # fmt: skip
        parts = {kind: body | changed.get(kind, {}) for kind, body in parts.items()}
        with Store(paths[origin]) as database:
            database.add(parts, status, ms if status == "confirmed" else None, at=time.perf_counter_ns())

    add.lookup = lambda: Lookup(lambda: [(name, Store(path)) for name, path in paths.items()])
    add.path = paths["user"]
    return add


def sized(n, **changed):
    return dataclasses.replace(PROBLEM, queries=n, keys=n, **changed)


def test_nothing_is_served_of_nothing(planted):
    assert planted.lookup()("torch", PROBLEM) is None
    assert planted.lookup()("torch", sized(0)) is None


def test_the_fastest_config_of_the_problem(planted):
    planted(2.0)
    planted(1.0, config=CONFIG | {"BLOCK_M": 128})
    planted(0.5, config=CONFIG | {"BLOCK_M": 256})
    planted(None, config=CONFIG | {"BLOCK_M": 256}, status="out of memory")
    assert planted.lookup()("torch", PROBLEM)[:2] == (CONFIG | {"BLOCK_M": 128}, "tuned, user")
    assert planted.lookup()("torch", PROBLEM.reversed()) is None


@pytest.mark.parametrize("status", store.BROKEN)
def test_what_was_broken_at_another_size_is_not_served(planted, status):
    planted(1.0)
    planted(None, problem=sized(8192), status=status)
    assert planted.lookup()("torch", PROBLEM) is None
    planted(2.0, config=CONFIG | {"BLOCK_N": 16})
    planted(None, problem=sized(8192), config=CONFIG | {"BLOCK_N": 16}, status="out of memory")
    assert planted.lookup()("torch", PROBLEM)[0]["BLOCK_N"] == 16


def test_tiers_come_before_origin(planted):
    """From the last to the first: each row planted is served before all those before it."""
    rows = [
        (
            {"problem": sized(1024), "toolchain": {"torch": "1"}},
            "tuned for 8 heads, M=1024 N=1024, 3.0 octaves off, with another toolchain, user",
        ),
        ({"toolchain": {"torch": "1"}, "origin": "shipped"}, "tuned, with another toolchain, shipped"),
        ({"toolchain": {"torch": "1"}}, "tuned, with another toolchain, user"),
        ({"problem": sized(1000)}, "tuned for 8 heads, M=1000 N=1000, 2.9 octaves off, user"),
        ({"problem": sized(1024), "origin": "shipped"}, "tuned for 8 heads, M=1024 N=1024, 3.0 octaves off, shipped"),
        ({"problem": sized(256)}, "tuned for 8 heads, M=256 N=256, 3.0 octaves off, user"),
        ({"problem": sized(640)}, "tuned for 8 heads, M=640 N=640, 1.0 octaves off, user"),
        ({"origin": "shipped"}, "tuned, shipped"),
        ({}, "tuned, user"),
    ]
    for i, (changed, words) in enumerate(rows):
        config = CONFIG | {"BLOCK_N": 16 + i}
        planted(1.0, config=config, **changed)
        assert planted.lookup()("torch", PROBLEM)[:2] == (config, words)


@pytest.mark.parametrize(
    "changed",
    [
        {"problem": sized(1025)}, {"problem": sized(255)}, {"problem": dataclasses.replace(PROBLEM, batch=3)},
        {"problem": dataclasses.replace(PROBLEM, head_dim=128)}, {"problem": dataclasses.replace(PROBLEM, dtype="float16")},
        {"problem": dataclasses.replace(PROBLEM, kv_heads=4)}, {"problem": dataclasses.replace(PROBLEM, skip=False)},
        {"problem": dataclasses.replace(PROBLEM, attend_current=True)}, {"kernel": {"sources": "of another day"}},
        {"machine": {"name": "another CPU"}}, {"machine": {"kind": "cuda", "capability": "9.0", "multiprocessors": 4}},
        {"config": {"BLOCK_M": 0, "BLOCK_N": 16, "HEADS": 1}}, {"config": {"TILE": 64}},
    ],
)  # fmt: skip
def test_what_never_serves(planted, changed):
    planted(1.0, **changed)
    assert planted.lookup()("torch", PROBLEM) is None


def test_an_illegal_config_leaves_the_next_one(planted):
    planted(1.0, config=CONFIG | {"BLOCK_M": 0})
    planted(2.0)
    assert planted.lookup()("torch", PROBLEM)[:2] == (CONFIG, "tuned, user")


def test_equals_go_the_same_way_in_any_order(tmp_path):
    backend, found = registry.load("torch"), set()
    rows = [CONFIG | {"BLOCK_N": n} for n in (16, 32, 64)]
    for i, order in enumerate(itertools.permutations(rows)):
        with Store(tmp_path / f"{i}.db") as database:
            for config in order:
                parts = {
                    "machine": keys.machine("cpu"), "toolchain": keys.toolchain(backend, "cpu"),
                    "kernel": keys.kernel(backend, "forward"), "problem": keys.problem(PROBLEM), "config": config,
                }  # fmt: skip
                database.add(parts, "confirmed", 1.0)
        found.add(str(Lookup(lambda i=i: [("user", Store(tmp_path / f"{i}.db"))])("torch", PROBLEM)))
    assert len(found) == 1


def test_distances():
    gpu = {"kind": "cuda", "capability": "9.0", "multiprocessors": 132}
    sizes = {"heads": 64, "queries": 4096, "keys": 4096}
    config = {"BLOCK_M": 128}
    assert octaves(sizes, sizes, gpu, gpu, config) == 0
    assert octaves(sizes, sizes | {"keys": 8192}, gpu, gpu, config) == 1
    assert octaves(sizes, sizes | {"keys": 8193}, gpu, gpu, config) is None
    # Half as many heads of twice the queries are as many waves.
    assert octaves(sizes, {"heads": 32, "queries": 8192, "keys": 4096}, gpu, gpu, config) == 1
    assert octaves(sizes, sizes, gpu, gpu | {"multiprocessors": 66}, config) == 1
    assert same_architecture(gpu, gpu | {"multiprocessors": 78}) and not same_architecture(gpu, gpu | {"multiprocessors": 40})
    assert not same_architecture(gpu, gpu | {"capability": "8.0"})


def test_dispatch_serves_it(planted):
    x = torch.randn(1, 8, 512, 64)
    planted(1.0)
    planted(1.0, problem=PROBLEM.reversed(), config=CONFIG | {"HEADS": 2})
    before = stickbreaking_attention(x, x, x, backend="torch")
    try:
        configs.install_lookup(planted.lookup())
        forward, backward = (dispatch.choose(p, "torch") for p in (PROBLEM, PROBLEM.reversed()))
        assert (configs.to_dict(forward.config), forward.provenance) == (CONFIG, "tuned, user")
        assert backward.config.HEADS == 2
        for got, wanted in zip(stickbreaking_attention(x, x, x, backend="torch"), before, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    finally:
        tuning.install()
    assert dispatch.choose(PROBLEM, "torch").provenance == "analytic default"


def test_the_users_database_is_asked(planted, monkeypatch):
    """By its variable; one that cannot be read is warned of, and attention goes on."""
    planted(1.0)
    try:
        monkeypatch.setenv(env.TUNING_DB, str(planted.path))
        tuning.install()
        assert dispatch.choose(PROBLEM, "torch").provenance == "tuned, your database"
        monkeypatch.setenv(env.TUNING_DB, str(planted.path.parent))
        tuning.install()
        with pytest.warns(UserWarning, match="tuned configs are not used: cannot open the tuning database"):
            assert dispatch.choose(PROBLEM, "torch").provenance == "analytic default"
        planted.path.write_bytes(b"no database" * 1000)
        monkeypatch.setenv(env.TUNING_DB, str(planted.path))
        tuning.install()
        with pytest.warns(UserWarning, match="was damaged"):
            assert dispatch.choose(PROBLEM, "torch").provenance == "analytic default"
    finally:
        monkeypatch.undo()
        tuning.install()


def test_damage_leaves_what_is_shipped(planted, tmp_path, monkeypatch):
    """100 truncations and flipped bits of the user's database: an answer each time, the user's where it is whole."""
    planted(1.0, config=CONFIG | {"BLOCK_N": 16})
    planted(1.0, origin="shipped")
    with Store(planted.path.parent / "shipped.db") as database:
        (tmp_path / "data").mkdir()
        database.export(tmp_path / "data" / "gpu.json")
    whole, generator, found = planted.path.read_bytes(), random.Random(2), collections.Counter()
    user = tmp_path / "damaged" / "t.db"
    monkeypatch.setenv(env.TUNING_DB, str(user))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "data")
    for damage in range(100):
        shutil.rmtree(user.parent, ignore_errors=True)
        user.parent.mkdir()
        user.write_bytes(damaged(whole, damage, generator))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = Lookup(tuning.databases)("torch", PROBLEM)
        assert answer.config == (CONFIG | {"BLOCK_N": 16} if "your database" in answer.provenance else CONFIG)
        found[answer.provenance] += 1
    print(f"\n100 damages of the user's database: {dict(found)}")
    assert found["tuned, shipped"] > 40


def test_what_is_shipped_is_not_slower_than_defaults():
    """Each shipped row was raced against its problem's default config on the same GPU; it is that, or faster."""
    found = collections.Counter()
    with tuning.shipped() as database:
        for trial in database.trials():
            default_ms = trial.details["default_ms"]
            assert trial.status == "confirmed" and trial.median <= default_ms
            found[trial.bodies["kernel"]["backend"], trial.median < default_ms] += 1
    print("\nshipped rows, by backend and whether faster than the default:", dict(found))
    assert {backend for backend, _ in found} == {"cuda", "ptx", "triton"}


def test_answers_in_another_thread(planted):
    planted(1.0)
    lookup, found = planted.lookup(), []
    assert lookup("torch", PROBLEM.reversed()) is None
    thread = threading.Thread(target=lambda: found.append(lookup("torch", PROBLEM)))
    thread.start()
    thread.join()
    assert [answer[:2] for answer in found] == [(CONFIG, "tuned, user")]


def test_answers_are_kept(planted):
    planted(1.0)
    lookup = planted.lookup()
    first = lookup("torch", PROBLEM)
    planted(0.5, config=CONFIG | {"BLOCK_N": 16})
    assert lookup("torch", PROBLEM) is first
    assert planted.lookup()("torch", PROBLEM)[0]["BLOCK_N"] == 16


def test_what_a_forward_saves_goes_with_its_backward(planted, monkeypatch):
    """Where the fastest of both directions do not match, one gives way to the next one that does, so that both take least time."""
    wide, narrow = CONFIG | {"BLOCK_N": 128}, CONFIG
    planted(1.0, config=wide)
    planted(1.5, config=narrow)
    planted(1.0, problem=PROBLEM.reversed(), config=narrow)
    backend = registry.load("torch")
    differ = lambda self, forward, backward: None if forward.BLOCK_N == backward.BLOCK_N else "differ"  # noqa: E731
    monkeypatch.setattr(type(backend), "mismatch", differ)
    try:
        configs.install_lookup(planted.lookup())
        assert dispatch.choose(PROBLEM, "torch").config.BLOCK_N == 128
        forward, backward = dispatch.choose_both(PROBLEM, "torch")
        assert (forward.config.BLOCK_N, backward.config.BLOCK_N) == (64, 64)
        assert forward.provenance == "tuned, user, to go with the backward's"
        planted(1.2, problem=PROBLEM.reversed(), config=wide)
        configs.install_lookup(planted.lookup())
        forward, backward = dispatch.choose_both(PROBLEM, "torch")
        assert (forward.config.BLOCK_N, backward.config.BLOCK_N) == (128, 128)
        assert backward.provenance == "tuned, user, to go with the forward's"
    finally:
        tuning.install()


def test_the_backend_that_was_measured_fastest_is_chosen(monkeypatch):
    """By both directions together, and only where the times are of the same machine and sizes."""
    answers = {}
    able = {"cuda": registry.load("torch"), "triton": None, "ptx": None, "torch": None}
    others = {name: dataclasses.make_dataclass(name, [])() for name in able}
    for name, backend in others.items():
        type(backend).name, type(backend).config_types = name, able["cuda"].config_types
        type(backend).unsupported = type(backend).slow = type(backend).illegal = type(backend).mismatch = lambda *_: None
        type(backend).default_config = lambda self, problem: "default"
    monkeypatch.setattr(registry, "try_load", lambda name: (others[name], None))
    try:
        configs.install_lookup(lambda name, problem, _: answers.get((name, problem.direction)))

        def plant(name, direction, ms, where="here"):
            answers[name, direction] = configs.Answer(CONFIG, "", ms, where)

        assert dispatch.choose(PROBLEM).backend is others["cuda"]
        for name, forward, backward in (("cuda", 1.0, 9.0), ("triton", 2.0, 7.0), ("ptx", 0.5, 10.0)):
            plant(name, "forward", forward)
            plant(name, "backward", backward)
        assert dispatch.choose(PROBLEM).backend is others["ptx"]
        chosen = dispatch.choose_both(PROBLEM)
        assert [choice.backend for choice in chosen] == [others["triton"]] * 2
        assert chosen[0].asked_by == "automatic: 9 ms tuned, cuda 10"
        plant("triton", "backward", 7.0, "elsewhere")
        assert dispatch.choose_both(PROBLEM)[0].backend is others["cuda"]
        del answers["cuda", "forward"]
        assert dispatch.choose_both(PROBLEM)[0].backend is others["cuda"]
    finally:
        tuning.install()


def test_a_miss_is_tuned_only_where_that_was_asked_for(monkeypatch):
    from sbkernels.tuning import autotune

    asked = []
    done = dataclasses.make_dataclass("Done", [("returncode", int), ("stderr", str)])
    monkeypatch.setattr(autotune.subprocess, "run", lambda command, **_: asked.append(command) or done(1, "no such luck"))
    problem = dataclasses.replace(PROBLEM, queries=77, keys=77)
    backend = registry.load("torch")
    assert configs.resolve(backend, problem)[1] == "analytic default" and not asked
    monkeypatch.setenv(env.AUTOTUNE, "1")
    with pytest.warns(UserWarning, match="torch was not tuned for forward .* no such luck"):
        configs.resolve(backend, problem)
    configs.resolve(backend, problem)
    assert len(asked) == 1 and Problem(**json.loads(asked[0][-1])) == problem
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="not in a job of several processes"):
        configs.resolve(backend, problem.reversed())
    monkeypatch.setenv(env.AUTOTUNE, "yes")
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        configs.resolve(backend, problem)


def test_answers_are_quick(planted):
    """Prints microseconds; the warm answer is held to 1, the cold one to 1,000 (least of several)."""
    for i in range(100):
        planted(1.0 + i, problem=sized(256 + i))
    lookup = planted.lookup()
    begin = time.perf_counter()
    lookup("torch", PROBLEM)
    first = time.perf_counter() - begin
    cold = []
    for n in range(300, 330):
        problem = sized(n)
        begin = time.perf_counter()
        lookup("torch", problem)
        cold.append(time.perf_counter() - begin)
    warm = min(timeit.repeat(lambda: lookup("torch", PROBLEM), number=10000, repeat=5)) / 10000
    print(f"\nwarm {warm * 1e6:.2f} us, cold {min(cold) * 1e6:.0f} us; a process's first, database opened, {first * 1e3:.1f} ms")
    assert warm <= 1e-6 and min(cold) <= 1e-3
