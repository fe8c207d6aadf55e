"""Who picks the backend and the config, and what is said when it cannot be."""

import dataclasses

import pytest
import torch

from sbkernels import (
    BackendError,
    api,
    config,
    dispatch,
    env,
    registry,
    stickbreaking_attention,
    stickbreaking_attention_varlen,
    use_backend,
)
from sbkernels.backends import torch_
from sbkernels.backends.torch_ import TorchBackend, TorchConfig
from sbkernels.problem import Problem

PROBLEM = Problem(1, 2, 2, 64, 64, 32, 32, "float32", "cpu")


def test_precedence(monkeypatch):
    assert dispatch.choose(PROBLEM).asked_by == "automatic"
    monkeypatch.setenv(env.BACKEND, "torch")
    assert dispatch.choose(PROBLEM).asked_by == env.BACKEND
    with use_backend("torch"):
        assert dispatch.choose(PROBLEM).asked_by == "use_backend()"
        assert dispatch.choose(PROBLEM, "torch").asked_by == "argument backend="
    monkeypatch.setenv(env.BACKEND, "auto")
    assert dispatch.choose(PROBLEM).asked_by == "automatic"


def test_automatic_leaves_the_interpreter_alone():
    if not torch.cuda.is_available():
        assert dispatch.choose(PROBLEM).backend.name == "torch"


def test_unknown_backend_lists_all(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "cuda9")
    with pytest.raises(ValueError, match="SBKERNELS_BACKEND names backend 'cuda9'") as raised:
        stickbreaking_attention(*[torch.zeros(1, 1, 4, 8)] * 3)
    assert all(name in str(raised.value) for name in registry.names())


def test_named_backend_never_falls_back():
    pytest.importorskip("triton")
    x = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match="asks for backend 'triton'") as raised:
        stickbreaking_attention(x, x, x, backend="triton")
    assert "torch: available" in str(raised.value)


def test_config_lookup_is_asked_and_checked():
    try:
        config.install_lookup(lambda *_: config.Answer({"BLOCK_M": 16, "BLOCK_N": 16, "HEADS": 1}, "exact record", 1.0, "here"))
        choice = dispatch.choose(PROBLEM, "torch")
        assert (choice.config, choice.provenance) == (TorchConfig(16, 16, 1), "exact record")
        config.install_lookup(lambda *_: config.Answer({"BLOCK_M": 0, "BLOCK_N": 16, "HEADS": 1}, "bad record", 1.0, "here"))
        assert dispatch.choose(PROBLEM, "torch").provenance == "analytic default"
    finally:
        config.install_lookup(None)


def test_blocks_that_ask_for_the_same_share_a_plan(monkeypatch):
    monkeypatch.setattr(api, "_plans", {})
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    for expected, given in enumerate((None, TorchConfig(16, 16, 1), TorchConfig(32, 16, 1)), 1):
        for _ in range(2):
            with use_backend("torch", forward=given):
                stickbreaking_attention(q, k, v)
            assert len(api._plans) == expected


@pytest.mark.parametrize("given", [{"BLOCK_M": 16}, 16], ids=str)
def test_what_is_no_config_is_refused(given):
    with pytest.raises(TypeError, match=r"backward=.*16.*: expected a TorchConfig or None"), use_backend("torch", backward=given):
        pass


def test_illegal_config_is_refused():
    with use_backend("torch", forward=TorchConfig(0, 16, 1)), pytest.raises(ValueError, match="BLOCK_M=0 is not a positive"):
        dispatch.choose(PROBLEM)


class Picky(TorchBackend):
    """Wants the same BLOCK_M in both directions."""

    def mismatch(self, forward, backward):
        return None if forward.BLOCK_M == backward.BLOCK_M else f"BLOCK_M={forward.BLOCK_M} and {backward.BLOCK_M}"


def test_tuned_configs_that_do_not_match_give_way():
    """Given ones do not: neither to defaults that match them nor to those that do not."""
    backend = Picky()
    default = backend.default_config(PROBLEM)
    assert backend.default_config(PROBLEM.reversed()).BLOCK_M == default.BLOCK_M

    def choice(block_m, provenance):
        return dispatch.Choice(backend, dataclasses.replace(default, BLOCK_M=block_m), "automatic", provenance)

    tuned, other = choice(16, "tuned"), choice(32, "tuned")
    assert dispatch.agree(PROBLEM, tuned, tuned) == (tuned, tuned)
    forward, backward = dispatch.agree(PROBLEM, tuned, other)
    assert forward.config == default and backward.config.BLOCK_M == default.BLOCK_M
    assert forward.provenance == "analytic default: tuned ones do not match"
    given = choice(default.BLOCK_M, "use_backend()")
    forward, backward = dispatch.agree(PROBLEM, given, other)
    assert forward is given and backward.config.BLOCK_M == default.BLOCK_M
    with pytest.raises(ValueError, match="BLOCK_M=16 and"):
        dispatch.agree(PROBLEM, choice(16, "use_backend()"), other)


def test_mismatched_triton_configs_are_refused():
    triton_ = pytest.importorskip("sbkernels.backends.triton_")
    if not triton_.interpreting():
        pytest.skip("the small tensors below are for the interpreter")
    q = torch.zeros(1, 1, 4, 16, requires_grad=True)
    configs = {"forward": triton_.TritonForward(32, 64, 4, 1), "backward": triton_.TritonBackward(32, 32, 4, 1, 4, 1)}
    with use_backend("triton", **configs), pytest.raises(ValueError, match="BLOCK_N=64 forward and 32 backward"):
        stickbreaking_attention(q, q, q)


@pytest.fixture
def ran(monkeypatch):
    """(config, problem) of each run of the torch backend so far."""
    calls = []
    for direction in ("forward", "backward"):
        original = getattr(TorchBackend, direction)

        def spy(self, call, config, *more, original=original):
            calls.append((config, call.problem))
            return original(self, call, config, *more)

        monkeypatch.setattr(TorchBackend, direction, spy)
    return calls


def test_what_decides_takes_effect_at_once(ran, monkeypatch):
    """Calls alike in all but who asks for what: none is run as an earlier one was decided."""
    x = torch.zeros(1, 1, 40, 16)
    first, second = TorchConfig(16, 16, 1), TorchConfig(32, 32, 1)
    stickbreaking_attention(x, x, x, backend="torch")
    default = ran.pop()[0]
    assert default not in (first, second)
    for asked in (first, second, first):
        for _ in range(2):
            with use_backend("torch", forward=asked):
                stickbreaking_attention(x, x, x)
                assert ran.pop()[0] == asked
                with use_backend("torch"):
                    stickbreaking_attention(x, x, x)
                    assert ran.pop()[0] == default
                stickbreaking_attention(x, x, x)
                assert ran.pop()[0] == asked
    try:
        for tuned in (first, second):
            config.install_lookup(lambda *_, tuned=tuned: config.Answer(config.to_dict(tuned), "record", 1.0, "here"))
            stickbreaking_attention(x, x, x, backend="torch")
            assert ran.pop()[0] == tuned
    finally:
        config.install_lookup(None)
    stickbreaking_attention(x, x, x, backend="torch")
    assert ran.pop()[0] == default
    for name in ("fast", "torch", "faster", "torch"):
        monkeypatch.setenv(env.BACKEND, name)
        if name == "torch":
            stickbreaking_attention(x, x, x)
            assert ran.pop()[0] == default
        else:
            with pytest.raises(ValueError, match=f"SBKERNELS_BACKEND names backend '{name}'"):
                stickbreaking_attention(x, x, x)
    with pytest.raises(ValueError, match="argument backend= names backend 'fast'"):
        stickbreaking_attention(x, x, x, backend="fast")
    with pytest.raises(ValueError, match=r"argument backend= names backend \['torch'\]"):
        stickbreaking_attention(x, x, x, backend=["torch"])
    assert not ran


def test_workspace_takes_effect_at_once(monkeypatch):
    """It bounds the heads that the torch backend's backward takes at a time."""
    x = torch.zeros(1, 8, 40, 16, requires_grad=True)
    heads = []
    cut = torch_._parts
    monkeypatch.setattr(torch_, "_parts", lambda call, at_once, **rows: heads.append(at_once) or cut(call, at_once, **rows))
    for size in ("1", "256MiB", "1"):
        monkeypatch.setenv(env.WORKSPACE, size)
        stickbreaking_attention(x, x, x, backend="torch")[0].sum().backward()
    assert heads[1::2] == [1, 8, 1]


def test_problems_are_told_apart(ran):
    """By all that Problem holds, alignment included, whatever was run before."""
    memory = torch.zeros(2, 2, 40, 17)
    x = memory[..., :16].contiguous()
    padded, shifted = memory[..., :16], torch.zeros(x.numel() + 1)[1:].view(x.shape)
    kinds = [
        ((x, x, x), {}), ((x[:1], x[:1], x[:1]), {}), ((x, x[:, :1], x[:, :1]), {}), ((x[:, :, 8:], x, x), {}),
        ((x[..., :8], x[..., :8], x), {}), ((x, x, x[..., :8]), {}), ((x.double(), x.double(), x.double()), {}),
        ((x, x, padded), {}), ((x, shifted, x), {}), ((x, x, x), {"layout": "bnhd"}), ((x, x, x), {"attend_current": True}),
        ((x, x, x), {"skip_below": 0}),
    ]  # fmt: skip
    for _ in range(2):
        for tensors, options in kinds:
            stickbreaking_attention(*tensors, backend="torch", **options)
    problems = [problem for _, problem in ran]
    assert problems[: len(kinds)] == problems[len(kinds) :]
    aligned = [p.aligned for p in problems[: len(kinds)]]
    assert aligned == [True] * 7 + [False] * 2 + [True] * 3
    described = {dataclasses.replace(p, aligned=True) for p in problems}
    assert len(described) == len(kinds) - 2 and len(set(problems)) == len(kinds) - 1


def test_varlen_problems_are_told_apart(ran):
    x = torch.zeros(40, 2, 16)
    kinds = [([0, 40], 40), ([0, 40], 64), ([0, 10, 40], 40), ([0, 10, 40], 30)]
    for bounds, longest in kinds * 2:
        stickbreaking_attention_varlen(x, x, x, torch.tensor(bounds, dtype=torch.int32), longest, backend="torch")
    assert [(p.batch, p.queries, p.keys) for _, p in ran] == [(len(bounds) - 1, n, n) for bounds, n in kinds] * 2
    with pytest.raises(ValueError, match="max_seqlen=30: expected at least 40"):
        stickbreaking_attention_varlen(x, x, x, torch.tensor([0, 0, 40], dtype=torch.int32), 30, backend="torch")


@pytest.mark.parametrize(("text", "size"), [("", 2**28), ("1000", 1000), ("1 MiB", 2**20), ("3gib", 3 * 2**30)])
def test_workspace(monkeypatch, text, size):
    monkeypatch.setenv(env.WORKSPACE, text)
    assert env.workspace() == size


@pytest.mark.parametrize("text", ["0", "-1", "1MB", "lots", "1.5GiB"])
def test_bad_workspace(monkeypatch, text):
    monkeypatch.setenv(env.WORKSPACE, text)
    with pytest.raises(ValueError, match=f"SBKERNELS_WORKSPACE='{text}' is not a size"):
        env.workspace()


@pytest.mark.parametrize("name", registry.names())
def test_candidates_are_legal_and_rejections_have_reasons(name):
    backend, reason = registry.try_load(name)
    if backend is None:
        pytest.skip(reason)
    problem = PROBLEM
    if torch.cuda.is_available() and backend.unsupported(problem):
        problem = dataclasses.replace(PROBLEM, dtype="float16", device="cuda:0")
    if backend.unsupported(problem):
        pytest.skip(backend.unsupported(problem))
    for direction in (problem, problem.reversed()):
        legal, rejected = backend.candidates(direction)
        assert legal and all(backend.illegal(direction, c) is None for c in legal)
        assert all(reason for _, reason in rejected)
        assert backend.illegal(direction, backend.default_config(direction)) is None


XDG = "XDG_CACHE_HOME"


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "/home/me/.cache/sbkernels"),
        ({XDG: "/x"}, "/x/sbkernels"),
        ({XDG: "relative"}, "/home/me/.cache/sbkernels"),
        ({XDG: "/x", env.CACHE: "~/c"}, "/home/me/c"),
    ],
)
def test_cache_folder(monkeypatch, settings, folder):
    for name, value in ({XDG: "", env.CACHE: "", "HOME": "/home/me"} | settings).items():
        monkeypatch.setenv(name, value)
    assert str(env.cache_folder()) == folder
