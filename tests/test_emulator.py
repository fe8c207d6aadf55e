"""csrc's kernels without a GPU: what `tests/emulator` computes with them is right, and it finds what is planted in them."""

import concurrent.futures
import os
import shutil
import subprocess
import sys

import pytest
from emulator import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built with g++")

# What a GPU shows as wrong results now and then, or as a hang: (file of csrc, text, what takes its place, words of what is found).
PLANTED = {
    "the newer half does not wait for the older one's excess": (
        "hopper_backward_exchange.cuh",
        "barriers.wait(EXCESS_FULL + (half ^ 1) * C::SLOTS + slot, slot_parity);",
        "",
        "output='dq'",
    ),
    "dq's place is given back before it is read": (
        "hopper_backward_producers.cuh",
        "bulk_wait_read<0>();\n      barriers.arrive(DQ_EMPTY);",
        "barriers.arrive(DQ_EMPTY);",
        "output='dq'",
    ),
    "a turn is not passed on": (
        "hopper_backward_producers.cuh",
        "if (lane < turns) store_release(p.dq_turn + mine, work.tile + 1);",
        "",
        "nobody can go on",
    ),
    "lanes choose for themselves where their warp goes": (
        "hopper_backward.cuh",
        "if (__shfl_sync(ALL_LANES, (int)simple, 0))",
        "if (walks_simply(excess))",
        "lanes of a warp part",
    ),
    "values are given back while they are multiplied": (
        "hopper_forward.cuh",
        "wgmma_wait<0>();\n      release(shared.v_empty[values.stage]);\n      if",
        "release(shared.v_empty[values.stage]);\n      wgmma_wait<0>();\n      if",
        "output='out'",
    ),
}
# Three tiles of keys or more, small logits and large ones, an early stop; each on some schedules.
CASES = (
    "Case(regime=normal, M=400, N=400, D=64, Dv=64, H=1, Hk=1)",
    "Case(regime=std10, B=2, M=500, N=500, D=64, Dv=64, H=2, Hk=1, skip=True)",
)
JOBS = [f"{seed}:{(2, 20, 50, 100)[seed % 4]}:{1 + seed % 3} cuda float16 {case}" for seed in range(12) for case in CASES]


def check(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, build.HERE / "check.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_cases_of_the_harness():
    result = check()
    assert result.returncode == 0 and result.stdout.endswith(" jobs, 0 failed\n"), result.stdout + result.stderr


def test_random_problems_on_random_schedules():
    result = check("--seeds", 200)
    assert result.returncode == 0 and result.stdout == "200 jobs, 0 failed\n", result.stdout + result.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is said of kernels with each fault, and of those without."""

    def run(fault: str) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("planted") / "csrc"
        shutil.copytree(build.CSRC, folder)
        if fault:
            name, text, replacement, _ = PLANTED[fault]
            source = (folder / name).read_text()
            assert source.count(text) == 1, f"{name} has changed: plant the fault elsewhere"
            (folder / name).write_text(source.replace(text, replacement))
        return check("--csrc", folder, "--widths", 64, *(f"--job={job}" for job in JOBS))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(["", *PLANTED], pool.map(run, ["", *PLANTED]), strict=True))


def test_nothing_is_found_where_nothing_is_planted(found):
    assert found[""].returncode == 0, found[""].stdout + found[""].stderr


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found(found, fault):
    result = found[fault]
    assert result.returncode == 1 and PLANTED[fault][3] in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--job", "Case(N=3)"), "SEED:EAGERNESS:MULTIPROCESSORS"),
        (("--job", "1:2:3 cuda bfloat16 Case(N=3)"), "expected float16"),
        (("--seeds", -1), "expected 0 or more"),
        (("--csrc", "nowhere"), "expected a folder"),
        (("--widths", 65), "expected some of"),
    ],
)
def test_wrong_arguments(arguments, words):
    result = check(*arguments)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
