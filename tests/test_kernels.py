"""The plans of csrc's kernels, and what compiling them at run time gives, without a GPU."""

import dataclasses
import itertools
import re

import pytest
import torch

from sbkernels import config as configs
from sbkernels.backends import base, hopper, launches
from sbkernels.backends.launches import KERNELS, CudaBackward, CudaForward
from sbkernels.cli import explain, main
from sbkernels.problem import Problem, describe
from sbkernels.verify import inputs
from sbkernels.verify.run import why_not

cuda = pytest.importorskip("sbkernels.backends.cuda", reason="the CUDA extension was not built", exc_type=ImportError)
SHARED = {(8, 0): 163 * 2**10, (8, 6): 99 * 2**10, (9, 0): 227 * 2**10}  # bytes a block may have (CUDA programming guide)
WIDTHS = ((16, 16), (64, 64), (80, 50), (128, 128), (128, 64), (256, 256), (200, 136))


@pytest.fixture
def on(monkeypatch):
    """on((8, 0)): what torch would say of such a device."""

    def choose(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(launches, "multiprocessors", lambda device: 100)
        launches.shared_limit.cache_clear()
        launches.fitting_configs.cache_clear()

    yield choose
    launches.shared_limit.cache_clear()
    launches.fitting_configs.cache_clear()


def problem(dims=(64, 64), **more):
    values = dict(batch=2, heads=4, kv_heads=4, queries=256, keys=256, head_dim=dims[0], value_dim=dims[1], dtype="bfloat16")
    return Problem(**values | {"device": "cuda:0"} | more)


def test_parameters_are_packed_as_compiled():
    packed = {"forward": launches.FORWARD_PARAMS, "backward": launches.BACKWARD_PARAMS}
    for it in cuda._C.instances():
        direction = it["kernel"].removeprefix("hopper_").split("_")[0]
        hopper_backward = it["kernel"].startswith("hopper_backward")
        expected = launches.HOPPER_BACKWARD_ARGUMENTS if hopper_backward else packed[direction]
        assert it["params_bytes"] == expected.size, it


def test_shared_memory_is_planned_as_compiled():
    for it in cuda._C.instances():
        assert it["shared_bytes"] <= SHARED[9, 0], it
        if not it["kernel"].startswith("hopper"):
            assert launches.malformed(it["kernel"], it["config"]) is None
            assert launches.shared_bytes(it["kernel"], it["block_d"], it["block_d"], it["config"]) == it["shared_bytes"], it


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dims", WIDTHS)
def test_defaults_fit_the_device(on, capability, dims):
    on(capability)
    backend = cuda.CudaBackend()
    wide_on_little = capability == (8, 6) and max(dims) > 128
    reason = backend.unsupported(problem(dims))
    assert (reason is not None) == wide_on_little
    if reason is not None:
        assert "shared memory" in reason
        return
    forward = backend.default_config(problem(dims))
    backward = backend.default_config(problem(dims).reversed())
    assert backend.mismatch(forward, backward) is None
    for p, config in ((problem(dims), forward), (problem(dims).reversed(), backward)):
        assert backend.illegal(p, config) is None
        assert config in [*backend.config_space(p), backend.default_config(p)]


@pytest.mark.parametrize(("queries", "block_m"), [(256, 64), (1536, 64), (1664, 128)])
def test_few_blocks_are_small(on, queries, block_m):
    """Those of 128 rows only where every multiprocessor gets one."""
    on((8, 0))
    backend, p = cuda.CudaBackend(), problem(queries=queries, keys=queries)
    forward, backward = backend.default_config(p), backend.default_config(p.reversed())
    assert block_m == forward.BLOCK_M
    assert backend.mismatch(forward, backward) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"dtype": "float16", "attend_current": True}, None),
        ({"head_dim": 96, "value_dim": 32}, None),
        ({"kv_heads": 2}, None),
        ({"queries": 128}, None),
        ({"queries": 130, "keys": 130}, None),
        ({"queries": 1, "keys": 127}, "128 keys or more"),
        ({"varlen": True}, None),
        ({"aligned": False}, "16 bytes"),
    ],
)
def test_hopper_says_what_it_does_not_cover(on, change, says):
    on((9, 0))
    backend, p = cuda.CudaBackend(), problem(**change)
    reason = hopper.not_covered(p)
    assert (reason is None) if says is None else (says in reason)
    assert backend.default_config(p).HOPPER == (says is None) == backend.default_config(p.reversed()).HOPPER
    assert not backend.variants(p)["portable"].HOPPER
    assert (why_not(backend, "portable", p) == "") == (says is None) and why_not(backend, "", p) == ""
    config = backend.default_config(problem((p.head_dim, p.head_dim)))
    assert (backend.illegal(p, config) is None) == (says is None)
    on((8, 0))
    assert "9.0" in hopper.not_covered(p)


@pytest.mark.parametrize("dims", [(136, 16), (16, 136), (192, 192), (256, 128), (256, 256)])
def test_wide_problems_are_hoppers(on, dims):
    """Both ways, in tiles of 64 keys; or both portable."""
    on((9, 0))
    backend, p = cuda.CudaBackend(), problem(dims)
    forward, backward = backend.default_config(p), backend.default_config(p.reversed())
    assert forward.HOPPER and backward.HOPPER and forward.BLOCK_N == 64
    assert backend.mismatch(forward, backward) is None
    assert "QUERIES_BLOCK_N" in backend.mismatch(forward, backend.variants(p.reversed())["portable"])
    assert why_not(backend, "portable", p) == ""

    for change, capability in (({"aligned": False}, (9, 0)), ({"queries": 1, "keys": 100}, (9, 0)), ({}, (8, 0))):
        on(capability)
        other = problem(dims, **change)
        both = [backend.default_config(direction) for direction in (other, other.reversed())]
        assert both == [backend.variants(direction)["portable"] for direction in (other, other.reversed())]
        assert backend.illegal(other, forward) is not None and backend.mismatch(*both) is None


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("direction", KERNELS)
def test_every_legal_config_has_one_to_go_with(on, dims, direction):
    """And the first of all is the default."""
    on((9, 0))
    backend, p = cuda.CudaBackend(), problem(dims)
    here, there = (p, p.reversed()) if direction == "forward" else (p.reversed(), p)
    legal, others = backend.candidates(here)[0], backend.candidates(there)[0]
    assert legal[0] == backend.default_config(here) and len(legal) > 1
    for config in legal:
        assert any(backend.mismatch(*((config, x) if direction == "forward" else (x, config))) is None for x in others)


@pytest.mark.parametrize(
    ("capability", "head_dim", "forward", "backward"),
    [
        ((9, 0), 128, "kernels Hopper's", "kernels Hopper's"),
        ((9, 0), 256, "kernels Hopper's", "kernels Hopper's"),
        ((8, 0), 128, "kernels portable: the Hopper kernel needs compute", "kernels portable: the Hopper kernel needs compute"),
    ],
)
def test_explain_says_which_kernels(on, monkeypatch, capsys, capability, head_dim, forward, backward):
    """As on a machine with such a GPU."""
    on(capability)
    monkeypatch.setattr(configs, "_lookup", None)
    monkeypatch.setattr(explain, "check_device", lambda device: "cuda:0")
    options = main.parser().parse_args(["explain", "--backend", "cuda", "--keys", "1024", "--head-dim", str(head_dim)])
    options.device = "cuda"
    assert explain.explain(options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    first, second = (m.start() for m in re.finditer("kernels ", printed))
    assert printed[first:].startswith(forward) and printed[second:].startswith(backward)


@pytest.mark.parametrize("workspace", [1, 120, 200, 10**6], ids="{} bytes".format)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_backwards_keep_to_the_workspace(on, monkeypatch, packed, workspace):
    """Each (batch entry, key head) once, with its query heads, and scratch for no more of them than fit, but for one."""
    on((9, 0))
    monkeypatch.setattr(hopper, "error_flag", lambda _: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setenv("SBKERNELS_WORKSPACE", str(workspace))
    B, H, Hk, M = (1, 10, 5, 701) if packed else (3, 10, 5, 400)
    sizes = dict(batch=4, queries=400, keys=400, varlen=True, tokens=701) if packed else dict(batch=B, queries=M, keys=M)
    p = problem(heads=H, kv_heads=Hk, dtype="float16", device="cpu", **sizes)
    q, k = (torch.zeros(B, heads, M, 64, dtype=torch.float16) for heads in (H, Hk))
    cuts, statistic, asked = torch.tensor([0, 300, 300, 700, 701], dtype=torch.int32) if packed else None, torch.zeros(B, H, M), []
    arguments = (statistic, statistic, statistic, q, statistic, q, k, k)
    call = base.Call(p, q, k, k, 0.125, 0.0, cuts)
    found = list(hopper.plan_backward(call, 128, lambda blocks: asked.append(blocks) or blocks, *arguments))
    a_head = 2 * (701 // 64 + 4) if packed else 2 * 7
    assert not packed or a_head >= 2 * sum(-(-n // 64) for n in (300, 0, 400, 1))
    assert a_head <= max(asked) <= max(workspace, a_head) and max(asked) % a_head == 0

    seen, sizes = [], []
    for begin, chain in zip(found[::2], found[1::2], strict=True):
        assert [x.kernel for x in (begin, chain)] == ["hopper_backward_begin", "hopper_backward"] and begin.params == chain.params
        values = launches.HOPPER_BACKWARD_ARGUMENTS.unpack(chain.params)
        entries, heads, group = values[29:32]
        assert group == 2 and chain.grid == min(entries * heads // 2 * 4, 100)
        assert begin.grid == -(-entries * heads * 7 // 8) and (packed or entries * heads // 2 * a_head <= max(asked))
        at = [((address - x.data_ptr()) // 2 // (M * 64)) for address, x in zip(values[:28:4], (q, k, k, q, q, k, k), strict=True)]
        rows = [(address - statistic.data_ptr()) // 4 // M for address in values[-6:-2]]
        first = at[1]
        assert at == [2 * first, first, first, 2 * first, 2 * first, first, first] and rows == [2 * first] * 4
        sizes.append(heads // 2 * (1 if packed else entries))
        seen += range(first, first + sizes[-1])
    assert seen == list(range(B * Hk))
    assert max(sizes) - min(sizes) < len(sizes) * (Hk if heads == H else 1)  # whole batch entries, or key heads


@pytest.mark.parametrize(("layout", "as_is"), [(layout, layout != "broadcast") for layout in inputs.LAYOUTS])
def test_tensors_that_maps_cannot_address_are_copied(layout, as_is):
    x = inputs.arrange(torch.randn(3, 2, 129, 64, dtype=torch.float64).half(), layout)
    for found in (hopper.mappable(x), hopper.mappable_blocks(x)):
        assert torch.equal(found, x)
        assert (found.data_ptr() == x.data_ptr()) == as_is


def test_what_begins_at_an_odd_place_is_copied():
    x = torch.randn(2 * 3 * 129 * 64 + 1).half()[1:].view(2, 3, 129, 64)
    found = hopper.mappable(x)
    assert found.data_ptr() % 16 == 0 and torch.equal(found, x)


def test_keys_that_maps_cannot_address_in_blocks_are_copied():
    x = torch.randn(3, 200, 2, 64).half().transpose(1, 2)[:, :, :150]
    assert hopper.mappable(x) is x
    found = hopper.mappable_blocks(x)
    assert torch.equal(found, x) and found.is_contiguous()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CudaForward(96, 64, 4, 2), "not among the kernels that were compiled"),
        (CudaForward(128, 128, 12, 2, HOPPER=True), "Hopper"),
    ],
)
def test_illegal_configs_are_refused(on, config, says):
    on((8, 0))
    assert says in cuda.CudaBackend().illegal(problem(), config)


def test_directions_must_agree():
    backend, tiles = cuda.CudaBackend(), CudaBackward(16, 64, 64, 4, 2, 64, 16, 4, 2, 1)
    assert backend.mismatch(CudaForward(128, 64, 4, 2), tiles) is None
    assert "BLOCK_N=32" in backend.mismatch(CudaForward(128, 32, 4, 2), tiles)
    assert "HOPPER" in backend.mismatch(CudaForward(128, 64, 4, 2), CudaBackward(HOPPER=True))
    assert backend.mismatch(CudaForward(128, 64, 12, 3, HOPPER=True), tiles) is None
    assert "BLOCK_N=128" in backend.mismatch(CudaForward(128, 128, 12, 2, HOPPER=True), tiles)


@pytest.mark.parametrize(("units", "rows"), [(64, 4096), (1, 131072), (7, 1000), (64, 1)])
def test_chunks_fit_the_workspace(units, rows):
    workspace, block = 2**26, 128
    p = problem(batch=units, heads=1, kv_heads=1, queries=rows, keys=rows)
    row_bytes = launches.STATE_BYTES * launches.ceil_div(rows, 16)
    chunk_units, chunk_rows = launches.chunk_sizes(p, row_bytes, block, workspace)
    assert chunk_rows % block == 0
    assert chunk_units * chunk_rows * row_bytes <= max(workspace, block * row_bytes)
    whole = chunk_rows >= rows
    assert whole or chunk_units == 1
    chunks = launches.ceil_div(units, chunk_units)
    assert chunks * chunk_units - units < chunks  # of about the same size


class Recorder(launches.KernelBackend):
    """Launches nothing."""

    def __init__(self):
        self.launched = []

    def kernel(self, call, kernel, config):
        return kernel

    def launch(self, kernel, grid, params, device):
        self.launched.append((kernel, grid, params))


@pytest.mark.parametrize("saves", (True, False))
def test_forward_saves_where_a_backward_may_follow(saves, monkeypatch):
    """Else it allocates out and remainder alone, and tells the kernel so by null pointers."""
    allocated = []
    original = base.allocate
    monkeypatch.setattr(base, "allocate", lambda *arguments: allocated.append(original(*arguments)) or allocated[-1])
    q = torch.zeros(2, 4, 70, 16, dtype=torch.float16)
    backend, call = Recorder(), base.Call(describe(q, q, q), q, q, q, 0.25, 0.0, saves=saves)
    out, remainder, saved = backend.forward(call, CudaForward(64, 32, 4, 2))
    assert len(allocated) == (4 if saves else 2)
    ((kernel, grid, params),) = backend.launched
    assert (kernel, grid) == ("forward", 16)
    at_q, *_, at_remainder, at_carry, at_tile, ticket = values = launches.FORWARD_PARAMS.unpack(params)
    assert (at_q, *values[4:17:4]) == (*[q.data_ptr()] * 3, out.data_ptr(), 0)
    assert (at_remainder, ticket) == (remainder.data_ptr(), 0)
    assert (at_carry, at_tile) == (tuple(x.data_ptr() for x in saved) if saves else (0, 0))
    assert out.shape == q.shape and remainder.shape == q.shape[:3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_launch_without_a_gpu_is_a_clear_error():
    size = cuda._C.instances()[0]["params_bytes"]
    with pytest.raises(RuntimeError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
        cuda._C.launch(0, 1, bytes(size), 0, 0)
    with pytest.raises(ValueError, match=f"params has 3 bytes: expected {size}"):
        cuda._C.launch(0, 1, b"abc", 0, 0)
    with pytest.raises(IndexError):
        cuda._C.launch(10**6, 1, bytes(size), 0, 0)


@pytest.mark.parametrize(("dims", "architecture"), list(itertools.product(WIDTHS, ("sm_80", "sm_90"))))
def test_run_time_kernels_compile_without_spills(on, dims, architecture, monkeypatch, tmp_path):
    ptx = pytest.importorskip("sbkernels.backends.ptx", reason="no CuPy with NVRTC", exc_type=ImportError)
    monkeypatch.setenv("SBKERNELS_CACHE", str(tmp_path))
    on((8, 0) if architecture == "sm_80" else (9, 0))
    backend, p = ptx.PtxBackend(), problem(dims)
    for here in (p, p.reversed()):
        config = backend.default_config(here)
        for kernel in KERNELS[here.direction]:
            compiled, name = ptx.compiled(kernel, p.dtype, ptx._widths(p), config, architecture)
            resources = ptx.nvrtc.resource_usage(compiled)[name]
            assert resources.spill_bytes == 0, (kernel, config, resources)
            assert launches.shared_bytes(kernel, *ptx._widths(p), config.of(kernel)) <= launches.shared_limit(p.device)


def test_malformed_options_of_run_time_kernels_are_refused(on):
    ptx = pytest.importorskip("sbkernels.backends.ptx", reason="no CuPy with NVRTC", exc_type=ImportError)
    on((9, 0))
    backend, p = ptx.PtxBackend(), problem()
    good = backend.default_config(p.reversed())
    assert "multiple of 16" in backend.illegal(p, CudaForward(100, 64, 4, 2))
    assert "NUM_STAGES" in backend.illegal(p, CudaForward(128, 64, 4, 1))
    assert "SPLIT" in backend.illegal(p.reversed(), dataclasses.replace(good, KEYS_SPLIT=3))
    assert "quarters" in backend.illegal(p.reversed(), dataclasses.replace(good, KEY_GROUP=128))
    assert "shared memory" in backend.illegal(p, CudaForward(128, 128, 4, 16))
