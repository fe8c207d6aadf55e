"""The public functions: what they take, what they refuse, and with which words."""

import pytest
import torch

from sbkernels import api, reference, registry, stickbreaking_attention, stickbreaking_attention_varlen
from sbkernels.backends.base import guarded_outputs
from sbkernels.backends.torch_ import TorchBackend
from sbkernels.problem import is_aligned
from sbkernels.verify import inputs


def tensors(B=1, H=2, Hk=2, M=8, N=8, D=16, Dv=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    make = lambda h, n, d: torch.randn(B, h, n, d, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(H, M, D), make(Hk, N, D), make(Hk, N, Dv)


def test_bnhd_is_bhnd_transposed():
    q, k, v = tensors(H=4, M=5, N=9, Dv=24)
    out, r = stickbreaking_attention(q, k, v)
    flat = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out2, r2 = stickbreaking_attention(*flat, layout="bnhd")
    assert out2.shape == (1, 5, 4, 24) and out2.is_contiguous() and r2.shape == (1, 5, 4)
    torch.testing.assert_close(out2.transpose(1, 2), out)
    torch.testing.assert_close(r2.transpose(1, 2), r)


def test_varlen_is_each_sequence_alone():
    lengths = (3, 0, 5, 1)
    q, k, v = tensors(H=4, M=9, N=9)
    bounds = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    out, r = stickbreaking_attention_varlen(*flat, bounds, max(lengths), attend_current=True)
    exact = reference.per_sequence(reference.forward, (q, k, v), bounds, attend_current=True)
    torch.testing.assert_close(out.transpose(0, 1)[None], exact[0])
    torch.testing.assert_close(r.transpose(0, 1)[None], exact[1])


@pytest.mark.parametrize("shape", [{"B": 0}, {"M": 0}, {"M": 0, "N": 0}])
def test_empty(shape):
    q, k, v = (x.requires_grad_() for x in tensors(**shape))
    out, r = stickbreaking_attention(q, k, v)
    assert out.shape == (*q.shape[:3], 16) and r.shape == q.shape[:3]
    gradients = torch.autograd.grad((out.sum() + r.sum()), (q, k, v))
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, (q, k, v), strict=True))


def test_no_sequences():
    q = torch.zeros(0, 2, 8)
    out, r = stickbreaking_attention_varlen(q, q, q, torch.zeros(1, dtype=torch.int32), 0)
    assert out.shape == (0, 2, 8) and r.shape == (0, 2)


def test_one_token_sees_nothing():
    q, k, v = tensors(M=1, N=1)
    out, r = stickbreaking_attention(q, k, v)
    assert not out.any() and bool((r == 1).all())


def test_backends_know_whether_a_backward_may_follow(monkeypatch):
    saves, original = [], TorchBackend.forward
    monkeypatch.setattr(
        TorchBackend, "forward", lambda self, call, config: saves.append(call.saves) or original(self, call, config)
    )
    q, k, v = tensors()
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    packed = lambda: (x[0].transpose(0, 1) for x in (q, k, v))  # noqa: E731
    for wanted in ((), (q,), (k,), (v,)):
        for x in (q, k, v):
            x.requires_grad_(any(x is y for y in wanted))
        for _ in range(2):
            stickbreaking_attention(q, k, v, backend="torch")
            stickbreaking_attention_varlen(*packed(), bounds, 8, backend="torch")
            with torch.no_grad():
                stickbreaking_attention(q, k, v, backend="torch")
                stickbreaking_attention_varlen(*packed(), bounds, 8, backend="torch")
        assert saves == [bool(wanted)] * 2 + [False] * 2 + [bool(wanted)] * 2 + [False] * 2
        saves.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [{"M": 256, "N": 256, "D": 64, "Dv": 64}, {"Hk": 1, "M": 100, "N": 131, "Dv": 24}])
@pytest.mark.parametrize("backend", ["cuda", "ptx", "triton"])
def test_same_with_and_without_gradient(backend, shape):
    if registry.try_load(backend)[0] is None:
        pytest.skip(registry.try_load(backend)[1])
    q, k, v = (x.cuda() for x in tensors(B=2, dtype=torch.bfloat16, **shape))
    with guarded_outputs():
        without = stickbreaking_attention(q, k, v, backend=backend)
        within = stickbreaking_attention(q.requires_grad_(), k, v, backend=backend)
        torch.autograd.grad(within[0].sum(), q)
    assert all(torch.equal(x, y) for x, y in zip(without, within, strict=True))


def test_remainder_dtype():
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out, r = stickbreaking_attention(*tensors(dtype=dtype), backend="torch")
        assert out.dtype == dtype and r.dtype == expected


def test_early_stop_changes_no_more_than_it_may():
    q, k, v = tensors(M=300, N=300, D=32, Dv=32)
    exact, _ = stickbreaking_attention(q, k, v, skip_below=0)
    for skip_below in (2.0**-24, 1e-3, 0.5):
        out, _ = stickbreaking_attention(q, k, v, skip_below=skip_below)
        assert (out - exact).abs().max() <= skip_below * v.abs().max()


def test_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in tensors())
    (dq,) = torch.autograd.grad(stickbreaking_attention(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        dq.sum().backward()


def test_nothing_is_copied_on_the_way_in(monkeypatch):
    """Strided views reach the backend as they are."""
    from sbkernels.backends.torch_ import TorchBackend

    seen = []
    original = TorchBackend.forward
    monkeypatch.setattr(TorchBackend, "forward", lambda self, call, config: seen.append(call) or original(self, call, config))
    packed = torch.randn(2, 8, 3, 4, 16)
    q, k, v = packed.unbind(2)
    stickbreaking_attention(q, k, v, layout="bnhd", backend="torch")
    assert seen[0].q.data_ptr() == q.data_ptr() and seen[0].v.data_ptr() == v.data_ptr()


BAD = [
    (lambda q, k, v: stickbreaking_attention(1, k, v), TypeError, "q is a int"),
    (lambda q, k, v: stickbreaking_attention(q[0], k, v), ValueError, "q has shape .*: expected 4 dimensions"),
    (lambda q, k, v: stickbreaking_attention(q.int(), k, v), TypeError, "q has dtype torch.int32"),
    (lambda q, k, v: stickbreaking_attention(q, k.float(), v), TypeError, "k has dtype torch.float32 and q torch.float64"),
    (lambda q, k, v: stickbreaking_attention(q.mT, k, v), ValueError, "q has strides .* contiguous last dimension"),
    (lambda q, k, v: stickbreaking_attention(q, k[..., :8], v), ValueError, "k has head dim 8 and q 16"),
    (lambda q, k, v: stickbreaking_attention(q, k, v[:, :1]), ValueError, "v has 1 heads and k 2"),
    (lambda q, k, v: stickbreaking_attention(q, k, v[:, :, 1:]), ValueError, "v has 7 tokens and k 8"),
    (lambda q, k, v: stickbreaking_attention(q[:, :1], k, v), ValueError, "q has 1 heads and k 2: expected a positive multiple"),
    (lambda q, k, v: stickbreaking_attention(q, k[:, :, 1:], v[:, :, 1:]), ValueError, "8 queries and k 7 keys"),
    (lambda q, k, v: stickbreaking_attention(q.expand(2, 2, 8, 16), k, v), ValueError, "batch of q, k, v is 2, 1, 1"),
    (lambda q, k, v: stickbreaking_attention(q, k, v, layout="nbhd"), ValueError, "layout='nbhd': expected one of 'bhnd', 'bnhd'"),
    (lambda q, k, v: stickbreaking_attention(q, k, v, scale="1"), TypeError, "scale='1': expected a number"),
    (lambda q, k, v: stickbreaking_attention(q, k, v, scale=float("nan")), ValueError, "scale=nan: expected a finite number"),
    (lambda q, k, v: stickbreaking_attention(q, k, v, skip_below=1.0), ValueError, "skip_below=1.0: expected 0 <= skip_below < 1"),
    (lambda q, k, v: stickbreaking_attention(q, k, v, attend_current=1), TypeError, "attend_current=1: expected a bool"),
    (lambda q, k, v: stickbreaking_attention(q, k, v, backend="fast"), ValueError, "'fast', which is not registered"),
    (lambda q, k, v: stickbreaking_attention(*(x.repeat(1, 1, 1, 17) for x in (q, k, v))), ValueError, "272: expected 1 to 256"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_refused(call, error, words):
    """Also after good calls that differ in nothing else."""
    for options in ({}, {"attend_current": True, "scale": 1, "skip_below": 0}):
        stickbreaking_attention(*tensors(), **options)
    for _ in range(2):
        with pytest.raises(error, match=words):
            call(*tensors())


@pytest.mark.parametrize("flags", [{"attend_current": 0}, {"scale": True}, {"skip_below": False}], ids=str)
def test_flags_of_another_type_are_refused(flags):
    """Though equal to good ones."""
    for options in ({"attend_current": False}, {"scale": 1.0}, {"skip_below": 0}):
        stickbreaking_attention(*tensors(), **options)
    with pytest.raises(TypeError, match=f"{next(iter(flags))}=.*: expected a"):
        stickbreaking_attention(*tensors(), **flags)


def test_scale_is_each_calls_own():
    q, k, v = tensors()
    expected = [reference.forward(q, k, v, scale=scale)[0] for scale in (0.25, 1.0)]
    for scale, exact in ((None, expected[0]), (1.0, expected[1]), (1, expected[1]), (None, expected[0])):
        torch.testing.assert_close(stickbreaking_attention(q, k, v, scale=scale, skip_below=0)[0], exact)


def test_gradients_where_they_are_wanted(monkeypatch):
    """Outputs hang on the inputs that require gradients, with gradients on, whatever was wanted before."""
    monkeypatch.setattr(api, "_plans", {})
    for wanted in ((), (0,), (1,), (2,), (0, 1, 2)) * 2:
        inputs = [x.requires_grad_(i in wanted) for i, x in enumerate(tensors())]
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert not any(x.requires_grad for x in stickbreaking_attention(*inputs))
        assert all(x.requires_grad == bool(wanted) for x in stickbreaking_attention(*inputs))
        if wanted:
            stickbreaking_attention(*inputs)[0].sum().backward()
        assert all((x.grad is not None) == (i in wanted) for i, x in enumerate(inputs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_derivatives_are_refused():
    from torch.autograd import forward_ad

    q, k, v = tensors()
    stickbreaking_attention(q, k, v)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        stickbreaking_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


BAD_LENGTHS = [
    (torch.tensor([0, 5, 3, 8], dtype=torch.int32), 8, ValueError, "decreases from 5 to 3 at index 2"),
    (torch.tensor([0, 9], dtype=torch.int32), 9, ValueError, "ends with 9: expected 8"),
    (torch.tensor([1, 8], dtype=torch.int32), 8, ValueError, "starts with 1: expected 0"),
    (torch.tensor([0, 8], dtype=torch.int32), 7, ValueError, "max_seqlen=7: expected at least 8"),
    (torch.tensor([0, 8]), 8, TypeError, "cu_seqlens has dtype torch.int64: expected torch.int32"),
    (torch.tensor([[0, 8]], dtype=torch.int32), 8, ValueError, "cu_seqlens has shape"),
    (torch.tensor([0, 8], dtype=torch.int32), 8.0, TypeError, "max_seqlen=8.0: expected an int"),
    ([0, 8], 8, TypeError, "cu_seqlens is a list"),
]


@pytest.mark.parametrize(("bounds", "longest", "error", "words"), BAD_LENGTHS, ids=[words for *_, words in BAD_LENGTHS])
def test_lengths_refused(bounds, longest, error, words):
    flat = [x[0].transpose(0, 1) for x in tensors()]
    with pytest.raises(error, match=words):
        stickbreaking_attention_varlen(*flat, bounds, longest)


def test_lengths_are_trusted_when_told_so(monkeypatch):
    """Nothing reads cu_seqlens back before the backend."""
    flat = [x[0].transpose(0, 1) for x in tensors()]
    wrong = torch.tensor([0, 9], dtype=torch.int32)
    monkeypatch.setattr(api, "_run", lambda *arguments: (torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8)))
    stickbreaking_attention_varlen(*flat, wrong, 9, check_seqlens=False)
    monkeypatch.setenv("SBKERNELS_CHECK_SEQLENS", "0")
    stickbreaking_attention_varlen(*flat, wrong, 9)
    monkeypatch.setenv("SBKERNELS_CHECK_SEQLENS", "no")
    with pytest.raises(ValueError, match="SBKERNELS_CHECK_SEQLENS='no' is neither 0 nor 1"):
        stickbreaking_attention_varlen(*flat, wrong, 9)


@pytest.mark.parametrize("layout", ("offset", "scalar", "transposed"))
def test_gradients_that_kernels_cannot_load_are_copied(layout, monkeypatch):
    """To memory that begins where a row of 16 bytes may, also where it is contiguous but begins one element late."""
    triton_ = pytest.importorskip("sbkernels.backends.triton_")
    if not triton_.interpreting():
        pytest.skip("Triton takes no tensors of a CPU but through its interpreter")
    given = []
    monkeypatch.setattr(triton_, "plan_backward", lambda call, config, remainder, tile, log2, dout, *rest: given.append(dout) or [])
    q, k, v = (x.float().requires_grad_() for x in tensors(D=32, Dv=32))
    dout = inputs.arrange(torch.ones(q.shape), layout)
    torch.autograd.grad(stickbreaking_attention(q, k, v, backend="triton")[0], (q, k, v), dout)
    assert is_aligned(given[0]) and given[0].stride(-1) == 1 and torch.equal(given[0], dout)
