"""Random problems: drawn, written and read back, made smaller, remembered, replayed."""

import dataclasses

import pytest
import torch

from sbkernels import registry
from sbkernels.cli.main import main
from sbkernels.problem import DTYPES
from sbkernels.verify import fuzz, inputs, run
from sbkernels.verify.mutants import mutant, switches

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", registry.names())
def test_past_failures(backend):
    """Every line of the corpus on every backend, in its dtype and variant or, where there is none, in what there is."""
    loaded, reason = registry.try_load(backend)
    if loaded is None:
        pytest.skip(reason)
    try:
        taken = fuzz.dtypes(backend, DEVICE)
    except ValueError as error:
        pytest.skip(str(error))
    jobs = []
    for _, variant, dtype, case in fuzz.remembered(fuzz.FOLDER / "fuzz.txt"):
        dtype = dtype if dtype in taken else taken[0]
        problem = run.problem_of(inputs.make(case, DTYPES[dtype], DEVICE))
        if loaded.slow(problem) is None or max(case.N, *case.lengths, 0) <= 300:  # the interpreter takes minutes for the others
            jobs.append((backend, variant if variant in loaded.variants(problem) else "", dtype, case))
    outcomes = [outcome for _, outcome in fuzz.outcomes(jobs, DEVICE)]
    assert len(outcomes) == len(jobs) >= 3
    assert [outcome for outcome in outcomes if not outcome.ok] == []


def test_a_seed_is_a_problem():
    for seed in range(400):
        case = fuzz.draw(seed, "cpu")
        assert case == fuzz.draw(seed, "cpu")
        assert case.H % case.Hk == 0 and 1 <= case.D <= 256 and 1 <= case.Dv <= 256
        assert any(case.lengths) or 1 <= case.M <= case.N
        job = ("triton", "log space" if seed % 2 else "", "float16", case)
        assert fuzz.from_text(fuzz.to_text(job)) == job
    assert len({fuzz.draw(seed, "cpu").strides for seed in range(400)}) > 20
    assert fuzz.draw(16, "cpu").strides == fuzz.draw(23, "cpu").strides  # one family


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("torch float16", "expected"),
        ("float16 Case(M=3)", "names backend ''"),
        ("torch int8 Case(M=3)", "expected"),
        ("torch float16 Case(Q=3)", "expected one of regime"),
        ("torch float16 Case(M=x)", "'M=x' of a case"),
        ("torch float16 Case(M=3", "is no case"),
    ],
)
def test_text_that_is_no_job(text, words):
    with pytest.raises(ValueError, match=words):
        fuzz.from_text(text)


@pytest.mark.parametrize("layout", (*inputs.MEMORY, inputs.EXPANDED))
def test_memory(layout):
    """The same shape and values, but where memory is shared."""
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)
    found = inputs.arrange(x, layout)
    shared = {"broadcast": x[:, :1], "one_entry": x[:1], inputs.EXPANDED: x[:1, :1, :1, :1]}
    assert torch.equal(found, shared.get(layout, x).expand_as(x))
    assert (found.stride(-1) == 1) == (layout != inputs.EXPANDED)


def test_random_problems_on_torch():
    outcomes = [outcome for _, _, outcome in fuzz.fuzz("torch", "cpu", range(1000, 1080))]
    assert len(outcomes) == 80 and all(outcome.ok and outcome.findings for outcome in outcomes)


def test_shrinking_finds_the_smallest():
    begin = dataclasses.replace(fuzz.draw(3, "cpu"), lengths=(), B=3, H=6, Hk=3, M=500, N=1000, D=100, Dv=7, skip=True)
    tried = []

    def first_failing(cases):
        tried.extend(cases)
        return next((case for case in cases if case.N >= 37 and case.D > 20 and case.skip), None)

    assert str(fuzz.shrink(begin, first_failing)) == "Case(H=1, Hk=1, M=1, N=37, D=21, Dv=1, skip=True)"
    assert len(tried) < 1000
    packed = dataclasses.replace(begin, lengths=(5, 0, 40, 3), skip=False)
    failing = lambda cases: next((case for case in cases if 7 in case.lengths or max((*case.lengths, 0)) > 7), None)  # noqa: E731
    assert fuzz.shrink(packed, failing).lengths == (7,)


def test_a_failure_is_made_small_remembered_and_reproduced(tmp_path, capsys):
    path, words = tmp_path / "fuzz.txt", ["fuzz", "--backend", "torch", "--device", "cpu"]
    window = next(m for m in switches.TORCH if m.name == "window of 64")
    with mutant.planted(registry.load("torch"), window, switches.TORCH):
        record = str(tmp_path / "record.json")
        assert main([*words, "--seeds", "4", "--first-seed", "56", "--corpus", str(path), "--record", record]) == 1
        (job,) = set(fuzz.remembered(path))
        assert max(job[3].N, *job[3].lengths, 0) in (65, 66, 67) and job[3].D == 1
        assert main([*words, "--case", fuzz.to_text(job)]) == 1
    assert "FAILED torch" in capsys.readouterr().out
    assert main([*words, "--case", fuzz.to_text(job)]) == 0
    assert fuzz.to_text(job) in (tmp_path / "record.json").read_text()


def test_an_interruption_loses_nothing(tmp_path, monkeypatch, capsys):
    job = ("torch", "", "float32", inputs.Case(M=3, N=3))

    def interrupted(*_):
        yield 0, job, run.Outcome("torch", "", "float32", "planted", error="planted")
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "fuzz", interrupted)
    path = tmp_path / "fuzz.txt"
    words = ["fuzz", "--backend", "torch", "--device", "cpu", "--corpus", str(path)]
    assert main(words) == 130
    said = capsys.readouterr().out
    assert "interrupted after 1 of 300" in said and "1 failed" in said and "--first-seed 1\n" in said
    assert fuzz.remembered(path) == [job]
