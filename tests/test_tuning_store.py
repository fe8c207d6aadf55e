"""The tuning database: what is written stays, many may write, damage and later versions are met."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import time

import pytest
from planted import damaged

from sbkernels.problem import Problem
from sbkernels.registry import load
from sbkernels.tuning import disk, keys, store
from sbkernels.tuning.store import NewerDatabase, Store

PROBLEM = Problem(2, 8, 4, 512, 512, 64, 64, "float32", "cpu")
WRITERS, COMMITS = 8, 300
ORPHAN = '{"schema": 1}\n["trial", "a", "b", "c", "d", "e", "f", "ok", 1.0, "{}"]'  # of rows that are not there


def bodies(config=0, problem=PROBLEM, **changed):
    """What a trial was of, without asking the machine each time."""
    parts = {
        "machine": {"kind": "cpu", "name": "planted"}, "toolchain": {"torch": "2"}, "kernel": {"backend": "torch", "sources": "0"},
        "problem": keys.problem(problem), "config": {"BLOCK_M": config},
    }  # fmt: skip
    return parts | changed


def write(path, writer, commits, pause=0.0):
    with Store(path) as database:
        for i in range(commits):
            database.add(bodies(i % 7), "ok", 1.0 + i, writer=writer, number=i)
            time.sleep(pause)


def test_keys_tell_problems_and_machines_apart():
    one, other = keys.problem(PROBLEM), keys.problem(PROBLEM.reversed())
    assert keys.digest(one) != keys.digest(other) and one["sizes"] == {"heads": 16, "queries": 512, "keys": 512}
    assert keys.digest(one) == keys.digest(json.loads(keys.canonical(one)))
    machine = keys.machine("cpu")
    assert machine["kind"] == "cpu" and machine["cores"] == os.cpu_count()
    backend = load("torch")
    assert keys.kernel(backend, "forward") != keys.kernel(backend, "backward")
    assert "torch" in keys.toolchain(backend, "cpu")
    with pytest.raises(ValueError):
        keys.canonical({"ms": float("nan")})


def test_what_was_measured(tmp_path):
    """The least median, none where a trial failed, machine by machine and toolchain by toolchain."""
    with Store(tmp_path / "a.db") as database:
        database.add(bodies(1), "ok", 3.0, run=0)
        database.add(bodies(1), "ok", 2.0, run=1)
        database.add(bodies(2), "ok", 1.0)
        database.add(bodies(2), "wrong", error="out: 3 times its bound")
        database.add(bodies(3), "out of memory")
        database.add(bodies(1, problem=PROBLEM.reversed()), "ok", 0.1)
        database.add(bodies(1, toolchain={"torch": "1"}), "ok", 0.2)
        database.add(bodies(1, kernel={"backend": "torch", "sources": "1"}), "ok", 0.3)
        rows = database.measured(bodies()["kernel"])
        of_problem = [row for row in rows if row.problem == keys.problem(PROBLEM)]
        now = keys.digest(bodies()["toolchain"])
        found = {(row.config["BLOCK_M"], row.toolchain_id == now): (row.ms, row.broken) for row in of_problem}
        assert found == {(1, True): (2.0, False), (2, True): (None, True), (3, True): (None, False), (1, False): (0.2, False)}
        assert len(rows) == 5 and len(database.measured()) == 6


def test_what_is_refused(tmp_path):
    with Store(tmp_path / "a.db") as database:
        with pytest.raises(ValueError, match="status='fine': expected one of ok, confirmed, wrong"):
            database.add(bodies(), "fine", 1.0)
        for status, median in (("ok", None), ("confirmed", None), ("hung", 1.0)):
            with pytest.raises(ValueError, match="expected one with ok and confirmed, with others none"):
                database.add(bodies(), status, median)
        with pytest.raises(ValueError, match="expected machine, toolchain, kernel, problem, config"):
            database.add({"machine": {}}, "ok", 1.0)
        assert database.count() == 0


def test_many_writers_lose_nothing(tmp_path):
    path = tmp_path / "a.db"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write, args=(path, writer, COMMITS)) for writer in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WRITERS
    with Store(path) as database:
        assert database.count() == WRITERS * COMMITS and database.mended is None
    print(f"{WRITERS} writers, {COMMITS} commits each: {WRITERS * COMMITS} trials")


def test_a_kill_loses_at_most_the_trial_in_flight(tmp_path):
    """50 kills at random points."""
    random.seed(0)
    context = multiprocessing.get_context("fork")
    path, lost = tmp_path / "a.db", 0
    with Store(path) as database:
        for kill in range(50):
            before = database.count()
            process = context.Process(target=write, args=(path, f"kill {kill}", 1000, 0.001))
            process.start()
            time.sleep(random.uniform(0.02, 0.08))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            seen = [json.loads(body) for (body,) in database._connection.execute("SELECT body FROM trial")]
            numbers = sorted(trial["number"] for trial in seen if trial["writer"] == f"kill {kill}")
            assert numbers == list(range(len(numbers))), "a gap"
            assert database.count() == before + len(numbers)
            lost += not numbers
    assert lost < 50  # some wrote before they were killed
    with Store(path) as database:
        assert database.mended is None


def test_merging_is_the_same_in_any_order_and_again(tmp_path):
    exports = []
    for name in "abc":
        with Store(tmp_path / f"{name}.db") as database:
            for i in range(5):
                database.add(bodies(i), "ok", 1.0 + i, host=name if i else "all of them")
            exports.append(database.export())
    merged = set()
    for order in itertools.permutations(exports):
        with Store(tmp_path / "-".join(path.stem for path in order)) as database:
            new = [database.take_in(path) for path in (*order, *order)]
            assert new == [5, 4, 4, 0, 0, 0]
            merged.add(database.export().read_text())
    assert len(merged) == 1


@pytest.mark.parametrize(
    "text", ["", "no json", '{"schema": 1}\n["nowhere", 1]', '{"schema": 1}\n["trial", "a"]', '["schema"]', "{}", ORPHAN]
)
def test_what_is_no_export(tmp_path, text):
    path = tmp_path / "export.json"
    path.write_text(text)
    with Store(tmp_path / "a.db") as database:
        database.add(bodies(), "ok", 1.0)
        with pytest.raises(ValueError, match="is no export of a tuning database"):
            database.take_in(path)
        assert database.count() == 1


def test_later_versions_are_left_alone(tmp_path):
    path, export = tmp_path / "a.db", tmp_path / "export.json"
    Store(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(NewerDatabase, match="has schema 7, this version of sbkernels knows 1: upgrade it"):
        Store(path)
    assert path.read_bytes() == before
    export.write_text('{"schema": 7}\n')
    with Store(tmp_path / "b.db") as database, pytest.raises(NewerDatabase, match="has schema 7"):
        database.take_in(export)


def test_damage(tmp_path):
    """100 truncations and flipped bits: no crash; what is there is what was written, or what was exported."""
    random.seed(1)
    path = tmp_path / "a.db"
    with Store(path) as database:
        for i in range(40):
            database.add(bodies(i), "ok", 1.0 + i)
        export = database.export().read_text()
    whole, mended = path.read_bytes(), 0
    for damage in range(100):
        for file in tmp_path.iterdir():
            if file != path.with_suffix(".json"):
                file.unlink()
        content = damaged(whole, damage, random)
        path.write_bytes(content)
        try:
            database = Store(path)
        except NewerDatabase:  # a flip in the version
            assert path.read_bytes() == content
            continue
        with database:
            if database.mended:
                mended += 1
                assert "damaged" in database.mended and any("damaged-" in file.name for file in tmp_path.iterdir())
                assert database.export(tmp_path / "again").read_text() == export
            database.add(bodies(100), "ok", 0.5)
            assert database.count() >= 1
    assert mended > 40
    print(f"100 damages, {mended} of them seen and mended")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "file" / "a.db")


def test_a_warm_answer_takes_no_scan(tmp_path):
    with Store(tmp_path / "a.db") as database:
        plan = database._connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM trial WHERE kernel = 2 AND machine = 1 AND problem = 3"
        )
        assert "trial_of" in plan.fetchone()[3]
    assert store.SCHEMA == 1


def test_databases_are_merged_pruned_and_checked(tmp_path):
    with Store(tmp_path / "a.db") as one, Store(tmp_path / "b.db") as other:
        one.add(bodies(1), "confirmed", 1.0, at="2")
        other.add(bodies(1), "confirmed", 1.0, at="2")
        other.add(bodies(2, kernel={"backend": "torch", "sources": "old"}), "ok", 2.0, at="1")
        assert one.merge(other.path) == 1 and one.merge(other.path) == 0 and other.merge(one.path) == 0
        assert one.text() == other.text() and one.faults() == []
        assert [trial.median for trial in one.trials()] == [2.0, 1.0]
        assert [trial.median for trial in one.trials(kernel=bodies()["kernel"])] == [1.0]
        assert one.excerpt(("confirmed",)).count() == 1
        assert one.prune([bodies()["kernel"]]) == 1 and one.count() == 1 and one.prune([bodies()["kernel"]]) == 0
        assert one._connection.execute("SELECT count(*) FROM config").fetchone() == (1,)
        one._connection.execute("UPDATE config SET body = '{}'")
        one._connection.execute("UPDATE trial SET median = 0.5")
        assert len(one.faults()) == 2


def test_a_full_disk_loses_nothing(tmp_path):
    """SQLite says that the disk is full: the message names the file, what was stored stays."""
    with Store(tmp_path / "a.db") as database:
        database.add(bodies(0), "ok", 1.0)
        pages = database._connection.execute("PRAGMA page_count").fetchone()[0]
        database._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match=r"cannot write the tuning database .*a\.db.*full"):
            for i in range(1000):
                database.add(bodies(i), "ok", 1.0, padding="x" * 1000)
        count = database.count()
        database._connection.execute("PRAGMA max_page_count = 1000000")
        database.add(bodies(5000), "ok", 1.0)
        assert database.count() == count + 1 and database.faults() == []


def test_a_read_only_database_is_read(tmp_path):
    with Store(tmp_path / "a.db") as database:
        database.add(bodies(), "ok", 1.0)
    with Store(tmp_path / "a.db", writable=False) as database:
        assert database.count() == 1
        with pytest.raises(OSError, match="cannot write the tuning database"):
            database.add(bodies(2), "ok", 1.0)


def test_network_file_systems_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "file_system", lambda path: "nfs4")
    with pytest.raises(OSError, match=r"on a network file system \(nfs4\).*sbk db merge"):
        Store(tmp_path / "a.db")
    monkeypatch.undo()
    assert disk.file_system(tmp_path) not in ("", "nfs4")
