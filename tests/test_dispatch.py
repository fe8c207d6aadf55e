"""Who picks the backend and the config, and what is said when it cannot be."""

import pytest
import torch

from sbkernels import BackendError, config, dispatch, env, registry, stickbreaking_attention, use_backend
from sbkernels.backends.torch_ import TorchConfig
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
        config.install_lookup(lambda name, problem: ({"BLOCK_M": 16, "BLOCK_N": 16, "HEADS": 1}, "exact record"))
        choice = dispatch.choose(PROBLEM, "torch")
        assert (choice.config, choice.provenance) == (TorchConfig(16, 16, 1), "exact record")
        config.install_lookup(lambda name, problem: ({"BLOCK_M": 0, "BLOCK_N": 16, "HEADS": 1}, "bad record"))
        assert dispatch.choose(PROBLEM, "torch").provenance == "analytic default"
    finally:
        config.install_lookup(None)


def test_illegal_config_is_refused():
    with use_backend("torch", forward=TorchConfig(0, 16, 1)), pytest.raises(ValueError, match="BLOCK_M=0 is not a positive"):
        dispatch.choose(PROBLEM)


def test_mismatched_triton_configs_are_refused():
    triton_ = pytest.importorskip("sbkernels.backends.triton_")
    if not triton_.interpreting():
        pytest.skip("the small tensors below are for the interpreter")
    q = torch.zeros(1, 1, 4, 16, requires_grad=True)
    configs = {"forward": triton_.TritonForward(32, 64, 4, 1), "backward": triton_.TritonBackward(32, 32, 4, 1, 4, 1)}
    with use_backend("triton", **configs), pytest.raises(ValueError, match="BLOCK_N=64 forward and 32 backward"):
        stickbreaking_attention(q, q, q)


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
    for problem in (PROBLEM, PROBLEM.reversed()):
        legal, rejected = backend.candidates(problem)
        assert legal and all(backend.illegal(problem, c) is None for c in legal)
        assert all(reason for _, reason in rejected)
        assert backend.illegal(problem, backend.default_config(problem)) is None


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
