"""`sbk bench` and what it stands on, whatever the clock says: what follows from samples, is stored, refused, made of records."""

import json
import math
import signal
import subprocess
import sys

import pytest
import torch
from test_cli import interruptible, refused

from sbkernels import stickbreaking_attention
from sbkernels.bench import contenders, limits, readme, regress, run, sets, step, timer
from sbkernels.bench.rows import Row
from sbkernels.problem import DTYPES
from sbkernels.verify import inputs, record


def test_work_and_limits():
    """The least work of a small problem, counted by hand; the smallest of the three limits counts."""
    x = inputs.make(inputs.Case("alive", 1, 4, 2, 8, 8, 16, 16), torch.float32, "cpu")
    logits = 4 * 8 * 8 / 2
    tensors = 4 * (2 * 4 * 8 * 16 + 2 * 2 * 8 * 16 + 4 * 8)
    assert limits.work(x, "forward") == limits.Work(4 * 16 * logits, logits, tensors)
    backward = limits.work(x, "backward")
    assert backward.flops == 10 * 16 * logits and backward.special == 2 * logits and backward.bytes > tensors
    packed = inputs.make(inputs.Case("alive", H=4, Hk=2, D=16, Dv=16, lengths=(8, 0, 4)), torch.float32, "cpu")
    assert limits.work(packed, "forward").special == logits * (1 + 1 / 4)
    machine = limits.Limits(1.0, 1.0, 1.0)
    assert machine.least_ms(limits.Work(1e9, 1, 1))[1] == "tensor" and machine.least_ms(limits.Work(1e9, 1, 1))[0] == 1.0
    assert machine.least_ms(limits.Work(1, 2e6, 1)) == (2.0, "special function")
    assert machine.least_ms(limits.Work(1, 1, 3e6)) == (3.0, "memory")
    assert limits.Limits(1.0, None, 1.0).least_ms(limits.Work(1, 2e9, 3e6))[1] == "memory"


def test_the_sets():
    """Names are unique, alive and without early stop; tokens are constant; packs are full."""
    for name, make in sets.SETS.items():
        cases = make()
        assert len({case.name for case in cases}) == len(cases), name
        assert all(case.case.regime == "alive" and not case.case.skip and case.dtype in DTYPES for case in cases)
    assert {case.case.B * case.case.N for case in sets.training()} == {sets.TRAINING_TOKENS}
    lengths = sets.document_lengths(sets.PACKED_TOKENS)
    assert sum(lengths) == sets.PACKED_TOKENS and min(lengths) > 0 and lengths == sets.document_lengths(sets.PACKED_TOKENS)
    assert {case.case.M for case in sets.decode()} == {1} and max(case.case.N for case in sets.decode()) == 2**20


def test_contenders_agree():
    """Eager stick-breaking is the backends'; what a contender cannot take it says."""
    x = inputs.make(inputs.Case("alive", M=70, N=70, H=4, Hk=2), torch.float32, "cpu")
    from sbkernels import registry

    ours, plain = contenders.ours(x, registry.load("torch")), contenders.eager(x)
    for direction in ("forward", "backward"):
        for a, b in zip(ours[direction](), plain[direction](), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    packed = inputs.make(inputs.Case("alive", lengths=(3, 4)), torch.float32, "cpu")
    with pytest.raises(contenders.NotHere, match="packed"):
        contenders.eager(packed)
    with pytest.raises(contenders.NotHere, match="as many queries"):
        contenders.softmax(inputs.make(inputs.Case("alive", M=3, N=70), torch.float32, "cpu"), "SDPA math")
    with pytest.raises(contenders.NotHere, match="writes beyond its memory"):
        contenders.softmax(packed, "cuDNN")


@pytest.mark.parametrize("keys", [64, 4096, 16384, 65536])
def test_every_key_counts(keys):
    """Over as many keys as a problem may have, the last query's stick does not fall to where kernels take it for used up."""
    x = inputs.make(inputs.Case("alive", H=4, Hk=4, M=1, N=keys, D=64, Dv=16), torch.float32, "cpu")
    _, remainder = stickbreaking_attention(x.q, x.k, x.v, skip_below=0.0)
    assert remainder.min() > 2.0**-40


def test_a_step_trains_and_keeps_the_stick_alive():
    """Logits of the decoder's attention have the mean that is stated; weights move; softmax and stick-breaking differ."""
    seen = []

    def attend(q, k, v):
        seen.append((q @ k.transpose(-1, -2)).mean().item() * step.TINY.head_dim**-0.5)
        return step.stickbreaking("torch")(q, k, v)

    function = step.contender(step.TINY, attend, torch.float32, "cpu")["step"]
    function()
    assert abs(seen[0] - inputs.ALIVE_LOGIT) < 0.5
    step.contender(step.TINY, step.softmax("SDPA math", step.TINY, torch.float32, "cpu"), torch.float32, "cpu")["step"]()
    assert step.PAPER.weights // step.PAPER.layers == 1536 * (4 * 1536 + 3 * 4096)


@pytest.fixture
def quick(monkeypatch):
    """A set of two tiny problems, measured with three samples each."""
    cases = [
        sets.Case("tiny", sets.attention(1, 2, 1, 40, 40, 16), "float32"),
        sets.Case("one query", sets.attention(1, 2, 1, 1, 40, 16), "float32", ("decode",)),
    ]
    monkeypatch.setitem(sets.SETS, "cpu", lambda: [*cases, sets.step_case(step.TINY, "float32")])
    monkeypatch.setitem(run.EFFORT, "cpu", timer.Effort(seconds=0, least=8, most=8))
    monkeypatch.setattr(limits, "measure", lambda *_: limits.Limits(1.0, 1.0, 1.0))
    return ("bench", "--device", "cpu", "--backend", "torch")


def sbk_here(*words) -> int:
    from sbkernels.cli import main

    return main.main([str(word) for word in words])


def test_bench_stores_what_it_measured(quick, tmp_path, capsys, monkeypatch):
    stored = tmp_path / "b.json"
    peers = ("--beside", "SDPA math", "--beside", "eager")
    assert sbk_here(*quick, *peers, "--sustained", "0.01", "--json", stored) == 0
    content = json.loads(stored.read_text())
    assert (
        content["kind"] == "bench"
        and content["set"] == "cpu"
        and content["environment"]["sources"]["torch"]
        and content["canary"]["ms"] > 0
    )
    found = {(row["case"], row["contender"], row["direction"]): row for row in content["rows"]}
    assert len(found) == 3 + 3 + 3 + 2
    for row in found.values():
        assert row["ms"] > 0 and len(row["samples"]) == 8 and row["interval"][0] <= row["ms"] <= row["interval"][1], row
        assert (
            row["limit"] in ("tensor", "special function", "memory")
            and row["of_limit"] > 0
            and row["ok"]
            and "mean -6" in row["inputs"]
        )
        assert row["peak_bytes"] is None and row["warm_ms"] is None
        assert row["sustained"].pop("ms") > 0 and set(row["sustained"].values()) == {None}
        canary = content["canary"]["samples"][f"{row['case']}, {row['direction']}"]
        assert len(canary) == 8
    said = capsys.readouterr().out
    assert set(found["tiny", "torch", "forward"]["ratios"]) == {"SDPA math"}
    assert "tokens/s" in said and "over and over: alone for 0.01 s" in said and "torch forward: over and over 0." in said
    assert record.stale(stored) == []
    # The same samples are the same; a third more time is found and ends in status 1.
    rows = [(row, v) for row, v in regress.against(content, content) if v.word in ("SLOWER", "FASTER")]
    assert rows == []
    for row in content["rows"]:
        row["samples"] = [ms / 30 for ms in row["samples"]]
    (tmp_path / "fast.json").write_text(json.dumps(content))
    monkeypatch.setattr(regress, "MOVED", math.inf)  # whatever else this machine does meanwhile
    assert sbk_here(*quick, *peers, "--against", tmp_path / "fast.json") == 1
    assert "SLOWER" in capsys.readouterr().out
    assert sbk_here(*quick, "--against", tmp_path / "fast.json", "--beside", "none", "--case", "one query") == 0
    assert "formerly beside" in " ".join(capsys.readouterr().out.split())
    content["environment"]["cpu"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert "expected the same machine" in refused(capsys, *quick, *peers, "--against", tmp_path / "other.json")


def test_a_wrong_backend_has_no_time(quick, tmp_path, capsys, monkeypatch):
    from sbkernels.backends import torch_

    right = torch_.TorchBackend.forward

    def wrong(self, call, config):
        out, *rest = right(self, call, config)
        return out * 1.01, *rest

    monkeypatch.setattr(torch_.TorchBackend, "forward", wrong)
    assert sbk_here(*quick, "--beside", "none", "--case", "tiny", "--sustained", "0.01", "--json", tmp_path / "b.json") == 1
    content = json.loads((tmp_path / "b.json").read_text())
    ours = [row for row in content["rows"] if row["ours"]]
    assert ours and all(
        row["ms"] is None and not row["samples"] and not row["ok"] and "wrong on fresh inputs: out" in row["note"] for row in ours
    )
    assert all(row["sustained"] is None for row in ours) and "over and over 0" not in capsys.readouterr().out


def test_what_fails_is_a_note(quick, tmp_path, capsys, monkeypatch):
    """A peer that runs out of memory leaves the others be; so does time that runs out."""

    def no_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setitem(run.MAKERS, "eager", no_memory)
    assert sbk_here(*quick, "--beside", "eager", "--case", "tiny", "--json", tmp_path / "b.json") == 0
    rows = {(row["contender"], row["direction"]): row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert rows["torch", "forward"]["ms"] and "OutOfMemoryError: CUDA out of memory" in rows["eager", "backward"]["note"]
    assert sbk_here(*quick, "--minutes", "1e-9") == 0
    assert "left out: one query: no time was left" in capsys.readouterr().out

    def no_inputs(case, *rest, make=inputs.make):
        if case.regime == "alive":
            raise torch.OutOfMemoryError("too large")
        return make(case, *rest)

    monkeypatch.setattr(run.inputs, "make", no_inputs)
    monkeypatch.setattr(limits, "canary", lambda _: ("none", lambda: None))
    assert sbk_here(*quick) == 0 and "left out: tiny: OutOfMemoryError: too large" in capsys.readouterr().out


def test_what_takes_too_long_is_not_tried_again(quick, tmp_path, monkeypatch):
    cases = [sets.Case(str(n), sets.attention(1, 2, 1, n, n, 16), "float32", ("forward",)) for n in (40, 30, 50)]
    monkeypatch.setitem(sets.SETS, "cpu", lambda: cases)
    monkeypatch.setattr(run, "MAX_CALL_SECONDS", 0)
    assert sbk_here(*quick, "--beside", "eager", "--json", tmp_path / "b.json") == 0
    rows = [row for row in json.loads((tmp_path / "b.json").read_text())["rows"] if row["contender"] == "eager"]
    notes = [row["note"].split(":")[0] for row in rows]
    assert notes == ["not timed", "not timed", "not tried"] and all(row["ms"] is None for row in rows)


def test_events_are_held_against_graph_replay(monkeypatch):
    """With replays that are planted: they need a GPU."""
    x = inputs.make(inputs.Case("alive", M=300, N=300), torch.float32, "cpu")
    measured = run.Bench("cpu", [], (), limits.Limits(1.0, 1.0, 1.0))
    replays = {"agrees": 0.102, "differs": 0.2, "refuses": None}

    def replayed(name, device):
        if replays[name] is None:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return replays[name]

    monkeypatch.setattr(timer, "replayed", replayed)
    rows = {name: Row("c", 1, 2, 2, 300, 300, 32, 32, (), "float32", name, True, "forward", "", ms=0.1) for name in replays}
    measured._cross_check(x, {name: name for name in replays}, rows)
    notes = ["", "replayed from a graph 0.2000 ms", "not captured in a graph: RuntimeError: operation not permitted"]
    assert [row.note for row in rows.values()] == notes


@pytest.mark.parametrize(("error", "status", "said"), [(KeyboardInterrupt, 130, "interrupted"), (RuntimeError, 2, "lost")])
def test_what_was_measured_is_kept(quick, tmp_path, capsys, monkeypatch, error, status, said):
    def stop(self, case, rows, check=run.Bench._check):
        if case.name != "tiny":
            raise error(said)
        check(self, case, rows)

    monkeypatch.setattr(run.Bench, "_check", stop)
    assert sbk_here(*quick, "--beside", "none", "--json", tmp_path / "b.json") == status
    assert {row["case"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]} == {"tiny"}
    assert f"{said}: the problems above are complete" in capsys.readouterr().out


def test_ctrl_c(tmp_path):
    """A real one, in a process of its own."""
    command = [sys.executable, "-m", "sbkernels", "bench", "--device", "cpu", "--json", str(tmp_path / "b.json")]
    running = interruptible(command)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(timeout=10)  # of half a minute or more: imports take some of it where other work is beside
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said


def test_bench_refuses(tmp_path, capsys):
    (tmp_path / "text").write_text("no JSON")
    for arguments, words in (
        (("--set", "none"), "expected one of training"), (("--set", "training"), "the device is cpu"),
        (("--case", "none"), "a part of"),
        (("--beside", "none", "--beside", "x"), "--beside 'x': expected one of"), (("--minutes", "0"), "more than 0"),
        (("--minutes", "nan"), "more than 0"), (("--sustained", "-1"), "--sustained -1: expected more than 0"),
        (("--clock", "1000"), "of a GPU"), (("--backend", "none"), "not registered"),
        (("--against", str(tmp_path / "none")), "No such file"), (("--against", str(tmp_path / "text")), "is no record"),
        (("--against", str(record.FOLDER / "compare-cpu.json")), "is a record of 'compare'"),
    ):  # fmt: skip
        assert words in refused(capsys, "bench", "--device", "cpu", *arguments), arguments


def test_readme_says_what_the_records_say():
    """`sbk bench --readme` makes it so."""
    text = readme.README.read_text(encoding="utf-8")
    assert len(readme.MARKED.findall(text)) >= 2
    assert readme.filled(text) == text
    ran = json.loads((record.FOLDER / "verify-h100.json").read_text())["report"]["ran"]
    assert f"`tests/records/verify-h100.json` is a run on an H100: {ran:,} checks" in " ".join(text.split())


def test_tables_of_bench_records(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "FOLDER", tmp_path)
    sizes = {"case": "c", "B": 2, "H": 4, "Hk": 2, "M": 1, "N": 8, "D": 16, "lengths": []}
    rows = [
        {**sizes, "contender": "cuda", "direction": "decode", "ms": 0.5, "ratios": {"FlashAttention-2": 1.5, "cuDNN": 0.75}},
        {**sizes, "contender": "cuDNN", "direction": "decode", "ms": 0.375, "ratios": {"FlashAttention-2": 2.0}},
        {**sizes, "M": 8, "contender": "cuda", "direction": "step", "ms": 0.016, "ratios": {}},
        {**sizes, "M": 8, "contender": "ptx", "direction": "step", "ms": None, "ratios": {}},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"kind": "bench", "rows": rows}))
    made = readme.filled("a\n<!-- table: bench cuda:decode cuDNN:decode cuda:tokens -->\nold\n<!-- end of table -->\nb")
    assert made.splitlines()[2:6] == [
        "| B, H, N, D | cuda decode | cuDNN decode | cuda 1000 tokens/s |",
        "| --- | --- | --- | --- |",
        "| 2, 4 on 2, 1 of 8, 16 | 0.500 (1.50, 0.75) | 0.375 (2.00) | - |",
        "| 2, 4 on 2, 8, 16 | - | - | 1000 |",
    ]
    for asked, words in (("none cuda:decode", "No such file"), ("bench ptx:step", "none of these columns")):
        with pytest.raises(ValueError, match=words):
            readme.table(asked)
