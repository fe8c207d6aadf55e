"""Every kind of Triton launch the defaults produce compiles for sm_80 and sm_90, without spills and within shared memory.

Compiled in worker processes, where the kernels are not the interpreter's; no GPU is needed.
"""

import concurrent.futures
import itertools
import multiprocessing
import os

import pytest
import torch

SHARED_LIMIT = {80: 163 * 2**10, 90: 227 * 2**10}  # bytes of shared memory a block may have (CUDA programming guide)
DIMS = ((64, 64), (128, 128), (256, 256), (80, 48), (80, 50))
KINDS = ("even", "ragged", "varlen")  # even: no early stop, one head a key head; the others stop early and group heads
CASES = list(itertools.product(SHARED_LIMIT, DIMS, KINDS, (False, True)))


def launches(capability, dims, kind, log_space, padding=0):
    """The launches of one problem, forward and backward, with tensors that are never touched; padding: elements between heads."""
    from sbkernels.backends import triton_
    from sbkernels.backends.base import Call
    from sbkernels.problem import describe

    D, Dv = dims
    B, H, Hk, M, N = (2, 2, 2, 256, 256) if kind == "even" else (1, 4, 2, 250, 250) if kind == "varlen" else (2, 4, 2, 200, 250)
    dtype = torch.bfloat16 if kind == "even" else torch.float16
    sizes = ((H, M, D), (Hk, N, D), (Hk, N, Dv), (H, M, Dv))
    q, k, v, dout = (torch.empty(B, h, n * d + padding, dtype=dtype)[..., : n * d].unflatten(2, (n, d)) for h, n, d in sizes)
    cu_seqlens = torch.zeros(4, dtype=torch.int32) if kind == "varlen" else None
    skip_below = 0.0 if kind == "even" else 2.0**-24
    lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": 100} if kind == "varlen" else {}
    problem = describe(q, k, v, attend_current=kind == "varlen", skip_below=skip_below, **lengths)
    call = Call(problem, q, k, v, D**-0.5, skip_below, cu_seqlens)
    generation = (capability // 10, capability % 10)
    forward, backward = (triton_.default_config(p, generation, log_space) for p in (problem, problem.reversed()))
    out, r, oldest = torch.empty(B, H, M, Dv, dtype=dtype), torch.empty(B, H, M), torch.empty(B, H, M, dtype=torch.int32)
    planned = [triton_.plan_forward(call, forward, out, r, oldest, r)]
    planned += triton_.plan_backward(call, backward, r, oldest, r, dout, r, q, k, v)
    return planned[:3]


def compile_case(case):
    from sbkernels.triton_kernels.ahead_of_time import compile_launch

    found = {}
    for launch in launches(*case):
        resources = compile_launch(launch, case[0])
        found[launch.kernel.__name__] = (resources.registers, resources.spill_bytes, resources.shared_bytes)
    return found


def copies(padding):
    """16-byte asynchronous copies of each kernel for rows on 16 bytes of heads that are not a multiple of 16 elements apart."""
    from sbkernels.triton_kernels.ahead_of_time import compile_launch

    return [compile_launch(launch, 90).async_copies for launch in launches(90, (72, 72), "ragged", False, padding)]


@pytest.fixture(scope="module")
def pool():
    """Processes whose kernels are not the interpreter's."""
    pytest.importorskip("triton")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            yield pool
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(scope="module")
def compiled(pool):
    return {case: pool.submit(compile_case, case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"sm_{c[0]}-{c[1][0]}x{c[1][1]}-{c[2]}{'-log' if c[3] else ''}")
def test_compiles_without_spills(compiled, case):
    found = compiled[case].result()
    assert found.keys() == {"forward_kernel", "backward_queries_kernel", "backward_keys_kernel"}
    for kernel, (registers, spills, shared) in found.items():
        assert spills == 0, f"{kernel}: {spills} bytes of spills at {registers} registers"
        assert shared <= SHARED_LIMIT[case[0]], f"{kernel}: {shared} bytes of shared memory"


def test_what_is_aligned_is_copied_asynchronously(pool):
    """Triton takes no stride but a multiple of 16 elements for aligned, and gives wgmma wrong descriptors of what it loads so."""
    (padded, dense), least = pool.map(copies, (8, 16)), 8
    assert padded == dense and min(dense) >= least
