"""The harness on every backend that runs here, and the harness itself: does it see what is planted?"""

import json
import os

import pytest
import torch

import sbkernels
from sbkernels import registry
from sbkernels.backends.base import allocate, guarded_outputs
from sbkernels.verify import inputs, record, run, tolerance

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
JOBS, MISSING = run.plan(DEVICE, quick=torch.cuda.is_available())


@pytest.mark.parametrize("key", sorted({job[:3] for job in JOBS}), ids=" ".join)
def test_backend(key):
    """All cases and properties of one backend, variant and dtype."""
    failed, processes = [], os.cpu_count() if key[0] == "triton" else 1  # its interpreter takes a minute
    run.run([job for job in JOBS if job[:3] == key], DEVICE, lambda outcome: outcome.ok or failed.append(outcome), processes)
    assert not failed, "\n".join(map(str, failed))


def test_every_backend_runs_or_says_why():
    ran = {job[0] for job in JOBS}
    assert all(name in ran or MISSING[name] for name in registry.names())


@pytest.mark.parametrize("name", registry.names())
def test_many_far_keys(name):
    """Products of factors just below 1, if rounded to the same side each time, add up to 1.2 times the bound (once Triton's)."""
    x = inputs.make(inputs.Case("critical", B=1, H=1, Hk=1, M=16, N=8192, D=16, Dv=16), torch.float16, DEVICE)
    backend, reason = registry.try_load(name)
    reason = reason or backend.unsupported(run.problem_of(x))
    if reason:
        pytest.skip(reason)
    expected = run.expectation(x)[0][1]
    _, remainder = sbkernels.stickbreaking_attention(x.q, x.k, x.v, skip_below=0.0, backend=name)
    found = tolerance.compare(remainder, expected, "remainder")
    assert found.ok, found


def test_hangs_and_crashes_are_named(tmp_path, monkeypatch):
    """A torch backend that hangs on one case and kills its process on another, planted through sitecustomize."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "import sbkernels.backends.torch_ as t\n"
        "right = t.TorchBackend.forward\n"
        "def planted(self, call, config):\n"
        "    if call.problem.queries == 31: os._exit(3)\n"
        "    if call.problem.queries == 33: time.sleep(1000)\n"
        "    return right(self, call, config)\n"
        "t.TorchBackend.forward = planted\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    jobs = [("torch", "", "float32", inputs.Case(M=n, N=n)) for n in (30, 31, 32, 33, 34)]
    found = {}
    run.run(jobs, "cpu", lambda outcome: found.setdefault(outcome.name, outcome), processes=2, deadline=20.0)
    errors = {name.split("N=")[1].split(" ")[0].rstrip(",)"): outcome.error for name, outcome in found.items()}
    hung, died = "no result in 20 s: its process was killed", "its process died with exit status 3"
    assert errors == {"30": "", "31": died, "32": "", "33": hung, "34": ""}


CASE = inputs.Case(M=200, N=200, D=32, Dv=32)


@pytest.fixture(scope="module")
def exact():
    x = inputs.make(CASE, torch.bfloat16, "cpu")
    expected = run.expectation(x)
    good = tuple(expected[0][1].baseline[name] for name in tolerance.OUTPUTS)
    assert all(f.ok for f in run.judge(good, expected))
    return x, expected, good


def windowed(x, good):
    """Keys older than 64 dropped."""
    out = good[0].clone()
    half = x.q[:, :, 64:].float() @ x.k.float().transpose(-1, -2) * 32**-0.5
    j, i = torch.arange(200), torch.arange(64, 200)[:, None]
    seen = (j < i) & (j >= i - 64)
    log_rest = torch.nn.functional.logsigmoid(-half).masked_fill(~seen, 0)
    newer = log_rest.flip(-1).cumsum(-1).flip(-1) - log_rest
    A = (torch.nn.functional.logsigmoid(half) + newer).exp() * seen
    out[:, :, 64:] = (A @ x.v.float()).double()
    return (out, *good[1:])


PLANTED = {
    "a window of 64 keys": windowed,
    "one NaN": lambda x, good: (good[0].index_fill(3, torch.tensor([3]), float("nan")), *good[1:]),
    "one wrong element": lambda x, good: (good[0] + torch.nn.functional.one_hot(torch.tensor(77), 200)[:, None] * 0.05, *good[1:]),
    "a bf16 running sum": lambda x, good: (good[0] * (1 + 2e-2 * torch.randn(good[0].shape).sign()), *good[1:]),
    "no remainder gradient": lambda x, good: (*good[:2], good[2] * 0.99, *good[3:]),
    "dk and dv swapped": lambda x, good: (*good[:3], good[4], good[3]),
    "remainder of ones": lambda x, good: (good[0], torch.ones_like(good[1]), *good[2:]),
    "the last rows unwritten": lambda x, good: (*good[:4], torch.cat((good[4][:, :, :-3], good[4][:, :, -3:] * 0), 2)),
    "a row short": lambda x, good: (good[0][:, :, 1:], *good[1:]),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
def test_planted_errors_are_seen(exact, plant):
    x, expected, good = exact
    assert not all(f.ok for f in run.judge(plant(x, good), expected))


def test_writes_outside_of_an_output_are_seen():
    with pytest.raises(RuntimeError, match="wrote 1 elements after"), guarded_outputs():
        x = allocate((4, 4), torch.zeros(1))
        x.as_strided((1,), (1,), x.storage_offset() + 16).fill_(1.0)


def test_outputs_are_poisoned():
    with guarded_outputs():
        assert allocate((2, 3), torch.zeros(1)).isnan().all()
        assert (allocate((2,), torch.zeros(1), torch.int32) == torch.iinfo(torch.int32).min).all()


def test_record(tmp_path):
    rows = [{"backend": "torch", "worst": 0.5, "failed": [float("inf")]}]
    path = tmp_path / "record.json"
    record.write(path, "verify", rows)
    assert record.stale(path) == []
    content = json.loads(path.read_text())
    assert content["rows"] == [{"backend": "torch", "worst": 0.5, "failed": ["inf"]}]
    content["environment"]["sources"]["torch"] = "0"
    path.write_text(json.dumps(content))
    assert "torch: recorded sources 0" in record.stale(path)[0]
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a record"):
        record.stale(path)


def test_backward_keeps_to_linear_memory():
    """No tensor of the torch backend grows with N squared: none is as large as one head's logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from sbkernels import stickbreaking_attention

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return result

    N = 2048
    q, k, v = (torch.randn(1, 1, N, 16, requires_grad=True) for _ in range(3))
    with Watch():
        stickbreaking_attention(q, k, v, skip_below=0, backend="torch")[0].sum().backward()
    assert largest < N * N / 8
