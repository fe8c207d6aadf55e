"""Runs under load: what differs is counted and named, what hangs or crashes too."""

import json

import pytest
import torch

from sbkernels.cli.main import main
from sbkernels.verify import stress

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def test_torch_gives_the_same_bits(tmp_path, capsys):
    path = tmp_path / "record.json"
    assert main(["stress", "--backend", "torch", "--device", "cpu", "--runs", "20", "--record", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["runs"] for row in rows] == [20] * len(stress.PROBLEMS_CPU) + [0] * len(stress.PROPERTIES)
    assert all(row["ok"] for row in rows) and "a matter of GPUs" in rows[-1]["skipped"]
    assert "0 failed" in capsys.readouterr().out


def test_what_differs_is_counted(monkeypatch):
    calls = []

    def attend(x, guarded):
        calls.append(x)
        return tuple(torch.full((3,), 1.0 if len(calls) in (1, 2, 5) else 2.0) for _ in range(5))

    monkeypatch.setattr(stress.run, "attend", attend)
    row = stress.Row("torch", "float32", "planted")
    stress.repeat(row, stress.PROBLEMS_CPU[0], 5, "cpu")
    assert (row.runs, row.wrong, row.first_wrong, row.ok) == (5, 4 * 15 - 15, 1, False)


def test_a_failing_property_is_an_error(monkeypatch):
    monkeypatch.setattr(stress.run, "check_property", lambda *_: [stress.run.Finding("dk", 2.0, 0.0, 0.0, "by 3 bits")])
    row = stress.Row("torch", "float32", "streams")
    stress.check(row, "streams", "cpu")
    assert not row.ok and row.error == "dk: by 3 bits"


@pytest.mark.parametrize("runs", ("0", "-3"))
def test_refused(runs, capsys):
    assert main(["stress", "--runs", runs]) == 2 and "expected at least 1" in capsys.readouterr().err


def test_the_problem_that_is_asked_for():
    assert any((c.B, c.H, c.N, c.D) == (32, 32, 1024, 32) for c in stress.PROBLEMS_GPU)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_load_runs_beside():
    load = stress.Load(DEVICE)
    load.keep_up()
    assert load.count == stress.LOAD_AT_ONCE
