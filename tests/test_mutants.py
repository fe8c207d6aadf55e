"""Planted wrong implementations: the harness catches all of them, says when it does not, and plants what it says."""

import subprocess
import sys

import pytest
import torch

from sbkernels import registry, stickbreaking_attention
from sbkernels.cli.main import main
from sbkernels.verify.mutants import mutant, score, switches, wrappers

GPU = torch.cuda.is_available()


def test_every_mutant_of_torch_is_caught():
    verdicts = []
    score.run_all("torch", "cpu", verdicts.append)
    *mutants, shipped, switched_off = verdicts
    assert (shipped.mutant, switched_off.mutant) == ("as shipped", "switched off")
    assert shipped.caught_by == switched_off.caught_by == "" and shipped.checks == switched_off.checks > 100
    assert len({v.mutant for v in mutants}) == len(mutants) >= 40
    assert [v.mutant for v in mutants if not v.caught_by] == []
    # By what it computes: an exception would catch a mutant that was planted in the wrong way, too.
    assert [v.mutant for v in mutants if v.where.endswith("Error") or "Error:" in v.where] == ["one too far"]


@pytest.mark.parametrize("name", ("switched off", "diagonal", "stick not carried", "one row too many"))
def test_mutants_inside_triton(name):
    """A control and a few, on the checks that catch them; all of them: sbk verify --mutants --backend triton."""
    triton_ = pytest.importorskip("sbkernels.backends.triton_")
    before = triton_.forward_kernel
    device = "cuda:0" if GPU else "cpu"
    jobs = [job for job in score.plan("triton", device) if job[3] == "first_query_sees_nothing"]
    verdict = score.judge("triton", name, jobs, device)
    assert verdict.caught_by == ("" if name == "switched off" else "first_query_sees_nothing")
    assert triton_.forward_kernel is before and not any("triton_kernels_test_build" in name for name in sys.modules)


@pytest.mark.parametrize("backend", switches.SWITCHES)
def test_tables_are_of_the_present_sources(backend):
    """Every switch can be built in, twelve or more inside Triton's kernels; names are distinct; the originals have no switch."""
    paths = {"torch": "sbkernels.backends.torch_", "triton": "sbkernels.triton_kernels.step"}
    module = pytest.importorskip(paths[backend])
    folder = mutant.pathlib.Path(module.__file__)
    files = [folder] if backend == "torch" else sorted(folder.parent.glob("*.py"))
    built = mutant.sources_with_switches(files, switches.SWITCHES[backend])
    for number in range(1, 1 + len(switches.SWITCHES[backend])):
        assert any(f"MUTANT == {number} " in text for text in built.values())
    assert len(switches.SWITCHES[backend]) >= 12
    names = [m.name for m in score.table(backend)]
    assert len(set(names)) == len(names)
    assert not any("MUTANT" in path.read_text() for path in files)


def test_switches_that_do_not_fit_are_refused():
    assert mutant.with_switches("x = a + b", [(1, "a + b", "a"), (2, "a + b", "b")], "f") == (
        "x = ((a) if MUTANT == 1 else (b) if MUTANT == 2 else a + b)"
    )
    with pytest.raises(ValueError, match="0 times 'c'"):
        mutant.with_switches("x = a + b", [(1, "c", "a")], "f")
    with pytest.raises(ValueError, match="overlaps"):
        mutant.with_switches("x = a + b + c", [(1, "a + b", "a"), (2, "b + c", "a")], "f")


def test_planting_ends_with_the_block():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 9, 16) for _ in range(3))
    right = stickbreaking_attention(q, k, v, backend="torch")
    for wrong in (wrappers.MUTANTS[0], switches.TORCH[3]):
        with mutant.planted(registry.load("torch"), wrong, switches.TORCH):
            assert not torch.equal(stickbreaking_attention(q, k, v, backend="torch")[0], right[0])
        assert torch.equal(stickbreaking_attention(q, k, v, backend="torch")[0], right[0])


def test_a_survivor_and_a_failing_control_are_exit_status_1(monkeypatch, capsys):
    harmless = mutant.Mutant("harmless", "nothing is wrong", {"forward": lambda right, *rest: right(*rest)})
    jobs = score.plan("torch", "cpu")[:3]
    monkeypatch.setattr(score, "plan", lambda *_: jobs)
    monkeypatch.setattr(score, "table", lambda _: [wrappers.MUTANTS[2]])
    words = ["verify", "--mutants", "--backend", "torch", "--device", "cpu"]
    assert main(words) == 0 and "score 100 %" in capsys.readouterr().out
    monkeypatch.setattr(score, "table", lambda _: [wrappers.MUTANTS[2], harmless])
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "1 of 2 mutants caught" in said and "nothing" in said
    monkeypatch.setattr(score, "table", lambda _: [wrappers.MUTANTS[2]])
    built = mutant.sources_with_switches
    wrong = lambda *words: {name: text.replace("if problem.att", "if not problem.att") for name, text in built(*words).items()}  # noqa: E731
    monkeypatch.setattr(mutant, "sources_with_switches", wrong)
    monkeypatch.setattr(score, "SWITCHES", {"torch": []})
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "control, switched off: fails" in said and "control, as shipped: passes" in said and "score 100 %" in said


def test_a_mutant_that_hangs_ends_its_process():
    """Which is then what caught it (test_workers.py)."""
    code = """
import time
from sbkernels.verify import run
from sbkernels.verify.mutants import mutant, score
run.DEADLINE_SECONDS = 2.0
hangs = mutant.Mutant("hangs", "never ends", {"forward": lambda *_: time.sleep(1000)})
score.table = lambda _: [hangs]
score._work(("hangs", score.plan("torch", "cpu")), {}, "torch", "cpu")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and "Timeout" in result.stderr
