"""The commands as a user types them: what they print and how they end."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from sbkernels.cli import main
from sbkernels.problem import Problem
from sbkernels.tuning import keys
from sbkernels.tuning.store import Store


def sbk(*words, **environment):
    settings = {name: value for name, value in os.environ.items() if not name.startswith("SBKERNELS_")} | environment
    command = [sys.executable, "-m", "sbkernels", *words]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300)


def small_file(path, **more):
    q = torch.randn(1, 2, 70, 16, dtype=torch.float32)
    save_file({"q": q, "k": q.clone(), "v": q.clone()} | more, path)
    return str(path)


def test_info():
    result = sbk("info")
    assert result.returncode == 0 and "torch" in result.stdout and "SBKERNELS_WORKSPACE" in result.stdout


def test_explain():
    result = sbk("explain", "--keys", "2048", "--dtype", "float32", "--backend", "torch")
    assert result.returncode == 0 and "backend torch (asked for by: argument backend=)" in result.stdout


@pytest.mark.parametrize(
    "words", [("--kv-heads", "3"), ("--queries", "9999"), ("--head-dim", "300"), ("--dtype", "int8"), ("--device", "tpu")]
)
def test_explain_refuses(words):
    result = sbk("explain", *words)
    assert result.returncode == 2 and words[0] in result.stderr and "expected" in result.stderr


def test_compare_with_a_backend_that_is_not_there():
    result = sbk("compare", SBKERNELS_BACKEND="fast")
    assert result.returncode == 2
    assert "SBKERNELS_BACKEND names backend 'fast'" in result.stderr
    assert "triton:" in result.stderr and "torch: available" in result.stderr


def test_compare_a_file(tmp_path):
    path, stored = small_file(tmp_path / "in.safetensors"), tmp_path / "out.json"
    result = sbk("compare", "--input", path, "--json", str(stored), "--backend", "torch")
    assert result.returncode == 0, result.stderr
    assert "the stick lasts" in result.stdout
    content = json.loads(stored.read_text())
    assert {row["direction"] for row in content["rows"]} == {"forward", "backward"}
    assert all(row["ok"] and row["ms"] > 0 for row in content["rows"]) and content["environment"]["sources"]["torch"]


def test_compare_a_varlen_file(tmp_path):
    q = torch.randn(70, 2, 16)
    lengths = torch.tensor([0, 30, 30, 70], dtype=torch.int32)
    path = tmp_path / "in.safetensors"
    save_file({"q": q, "k": q.clone(), "v": q.clone(), "cu_seqlens": lengths}, path)
    result = sbk("compare", "--input", str(path), "--backend", "torch")
    assert result.returncode == 0, result.stderr


def test_compare_exits_1_when_a_bound_is_exceeded(tmp_path):
    """A torch backend whose remainder is wrong, planted through sitecustomize."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sbkernels.backends.torch_ as t\n"
        "right = t.TorchBackend.forward\n"
        "def wrong(self, call, config):\n"
        "    out, r, saved = right(self, call, config)\n"
        "    return out * 1.01, r, saved\n"
        "t.TorchBackend.forward = wrong\n"
    )
    path = small_file(tmp_path / "in.safetensors")
    result = sbk("compare", "--input", path, "--backend", "torch", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and "bound exceeded" in result.stdout


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: str(path / "none.safetensors"), "cannot read"),
        (lambda path: small_file(path / "a.safetensors", **{"x.q": torch.zeros(1, 1, 2, 16)}), "not x.k, x.v"),
    ],
)
def test_compare_refuses_files(tmp_path, make, words):
    result = sbk("compare", "--input", make(tmp_path))
    assert result.returncode == 2 and words in " ".join(result.stderr.split())


def test_verify_and_check_record(tmp_path):
    path = str(tmp_path / "record.json")
    result = sbk("verify", "--quick", "--backend", "torch", "--dtype", "float32", "--record", path)
    assert result.returncode == 0 and "0 failed" in result.stdout
    assert sbk("verify", "--check-record", path).returncode == 0
    content = json.loads((tmp_path / "record.json").read_text())
    content["environment"]["sources"]["torch"] = "0"
    (tmp_path / "record.json").write_text(json.dumps(content))
    result = sbk("verify", "--check-record", path)
    assert result.returncode == 1 and "stale" in result.stdout


def test_softplus(tmp_path):
    pytest.importorskip("sbkernels._C", reason="the extension sbkernels._C is not built")
    stored = tmp_path / "out.json"
    result = sbk("softplus", "--device", "cpu", "--json", str(stored))
    assert result.returncode == 0, result.stderr
    assert "softplus2 polynomial" in result.stdout and "of 2^32 inputs" in result.stdout
    content = json.loads(stored.read_text())
    assert content["environment"] and all(row["lost_nans"] == 0 and row["logits_per_clock"] is None for row in content["rows"])


def test_softplus_without_the_extension(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sbkernels._C'] = None\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = sbk("softplus", PYTHONPATH=path)
    assert result.returncode == 2 and "pip install -c constraints.txt" in result.stderr and "Traceback" not in result.stderr


def test_verify_refuses():
    assert sbk("verify", "--dtype", "int4").returncode == 2
    assert sbk("verify", "--backend", "none").returncode == 2


def refused(capsys, *arguments) -> str:
    """What a command says that cannot be met, run in this process."""
    assert main.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_db(tmp_path, capsys):
    """Export, import, merge, show, history, check, prune; wrong arguments."""
    one, other, export = (str(tmp_path / name) for name in ("one.db", "other.db", "export.json"))
    assert sbk("db", "show", "--db", one).returncode == 2
    with Store(one) as store:
        problem = Problem(1, 2, 2, 64, 64, 32, 32, "float32", "cpu")
        parts = {"machine": {"name": "planted"}, "toolchain": {}, "kernel": {"backend": "torch"}, "config": {"BLOCK_M": 64}}
        store.add(parts | {"problem": keys.problem(problem)}, "confirmed", 1.5, samples=[1.5])
        store.add(parts | {"problem": keys.problem(problem), "config": {"BLOCK_M": 16}}, "hung", why="planted hang")
    assert "2 trials stored" in sbk("db", "export", export, "--db", one).stdout
    assert "2 trials taken" in sbk("db", "import", export, "--db", other).stdout
    assert "0 trials new" in sbk("db", "merge", one, "--db", other).stdout
    shown = sbk("db", "show", "--db", other).stdout
    assert all(words in shown for words in ("planted", "BLOCK_M=64", "N=64", "1.5")) and "BLOCK_M=16" not in shown
    assert "hung: planted hang" in " ".join(sbk("db", "history", "--db", other).stdout.split())
    assert "2 trials, 0 of the present kernels, 0 faults" in sbk("db", "check", "--db", other).stdout
    assert "2 trials stored" in sbk("db", "export", export, "--only", "served", "--db", other).stdout
    assert "samples" not in pathlib.Path(export).read_text()
    assert "2 trials of other kernels removed, 0 left" in sbk("db", "prune", "--db", other).stdout
    for arguments, words in (
        (("import",), "expected one FILE or more"), (("export",), "expected one FILE"), (("show", "x"), "expected no FILE"),
        (("import", str(tmp_path / "none")), "there is no file"), (("import", one), "is no export of a tuning database"),
        (("merge", other), "with itself"), (("show", "--only", "served"), "expected with export"),
    ):  # fmt: skip
        assert words in refused(capsys, "db", *arguments, "--db", other), arguments


def test_tune_and_explain(tmp_path):
    """The torch backend is tuned for a problem, the dispatcher then serves what was found; a second run measures nothing."""
    path = str(tmp_path / "t.db")
    shape = ("--shape", "1,2,32,16", "--backend", "torch", "--budget", "6", "--direction", "forward")
    run = sbk("tune", *shape, SBKERNELS_TUNING_DB=path, OMP_NUM_THREADS="1")
    assert run.returncode == 0 and f"tuned in {path}" in run.stdout, run.stderr
    sizes = ("--heads", "2", "--keys", "32", "--head-dim", "16", "--dtype", "float32", "--backend", "torch")
    assert "(tuned, your database)" in sbk("explain", *sizes, SBKERNELS_TUNING_DB=path).stdout


def test_the_guided_search_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'sbkernels[tune]'" in refused(capsys, "tune", "--device", "cpu", "--strategy", "guided")


def test_tune_refuses(tmp_path, capsys):
    newer = tmp_path / "newer.db"
    with Store(newer) as store:
        store._connection.execute("PRAGMA user_version = 99")
    for arguments, words in (
        (("--backend", "none"), "not registered"), (("--backend", "cuda"), "nothing to tune on cpu"),
        (("--budget", "0.5"), "expected at least"), (("--budget", "nan"), "expected at least"),
        (("--set", "none"), "expected one of"),
        (("--shape", "1,2,3"), "expected B,H,N,D"), (("--dtype", "int4"), "expected one of"), (("--gpus", "2"), "expected all"),
        (("--gpus", "all"), "no CUDA device"), (("--db", "/proc/none/t.db"), "/proc/none"), (("--db", str(newer)), "has schema 99"),
        (("--replay", str(tmp_path / "none")), "there is no file"),
    ):  # fmt: skip
        assert words in refused(capsys, "tune", "--device", "cpu", *arguments), arguments


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_tune_is_interrupted(how, tmp_path):
    """By Ctrl-C, or by what schedulers send: what was measured is kept and said, the exit status is 130."""
    environment = os.environ | {"SBKERNELS_TUNING_DB": str(tmp_path / "t.db"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sbkernels", "tune", "--device", "cpu", "--shape", "1,4,400,64", "--backend", "torch"]
    running = interruptible(command, env=environment)
    until = time.monotonic() + 60
    while time.monotonic() < until and not measured(tmp_path / "t.db"):
        time.sleep(0.2)
    running.send_signal(how)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and "the next run goes on from there" in printed and "tuned in" in printed
    assert measured(tmp_path / "t.db")


def interruptible(command: list[str], **options) -> subprocess.Popen:
    """A process that SIGINT reaches: what a script runs in the background inherits that it is ignored."""
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds, **options)


def measured(path: pathlib.Path) -> int:
    if not path.exists():
        return 0
    with Store(path, writable=False) as store:
        return store.count()
