"""What `sbk sanitize` makes of compute-sanitizer's words, and what it says where there is none."""

import stat

import pytest
import torch

from sbkernels.cli.main import main
from sbkernels.verify import inputs, sanitize

MEMCHECK = """\
========= COMPUTE-SANITIZER
problem 1: Case(M=1, N=1)
problem 2: Case(M=3, N=70)
========= Invalid __global__ write of size 4 bytes
=========     at writes_behind(int *)+0x60 in planted.cu:9
=========     by thread (63,0,0) in block (0,0,0)
=========     Access at 0x7f4b96600100 is out of bounds
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on cudaDeviceSynchronize.
=========     Saved host backtrace up to driver entry point at error
=========
all problems ran
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
problem 17: Case(M=256, N=256, H=4, D=128, Dv=128)
========= Error: Race reported between Write access at void sbk::store_shared<(int)135168>(unsigned int, float)+0x8d10 in x.cuh:84
=========     and Read access at float sbk::load_shared<(int)135168>(unsigned int)+0x9260 in instructions.cuh:91 [1456 hazards]
=========     and Read access at float sbk::load_shared<(int)135168>(unsigned int)+0x9290 in instructions.cuh:91 [14 hazards]
=========
========= Error: Race reported between Write access at forward_kernel<C>(P)+0x10 in forward.cuh:20
=========     and Read access at forward_kernel<C>(P)+0x20 in forward.cuh:22 [4 hazards]
=========
all problems ran
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
problem 5: Case(M=129, N=129, skip=True)
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void sbk::hopper_backward::convert_dq<C>(P)+0x110 in hopper_backward_results.cuh:60
=========     by thread (66,0,0) in block (2,0,0)
=========     Address 0x7f1430849620
=========
========= Uninitialized __global__ memory read of size 16 bytes
=========     at sbk::copy_async_16(unsigned int, const void *, int)+0x38e0 in instructions.cuh:61
=========     by thread (48,0,0) in block (10,0,0)
=========     Address 0x7f1c1a966500
=========         Device Frame: void sbk::backward_keys_kernel<C>(P)::[lambda(int)]::operator ()(int) const in backward_keys.cuh:189
=========         Device Frame: void sbk::backward_keys_kernel<C>(P)+0x2660 in backward_keys.cuh:200
=========
========= Uninitialized __global__ memory read of size 16 bytes
=========     at sbk::copy_async_16(unsigned int, const void *, int)+0x38e0 in instructions.cuh:61
=========     by thread (48,0,0) in block (10,0,0)
=========     Address 0x7f1c1a966500
=========         Device Frame: void sbk::load_tile<(int)64, (int)128>(unsigned int)+0x3aa0 in tile.cuh:80
=========         Device Frame: void sbk::backward_keys_kernel<C>(P)+0x2660 in backward_keys.cuh:200
=========
all problems ran
========= ERROR SUMMARY: 3 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\nall problems ran\n========= ERROR SUMMARY: 0 errors\n"


def test_parse():
    report = sanitize.parse(MEMCHECK)
    assert report.errors == 2 and report.trouble == ""
    assert [f.headline.split(" on ")[0][:26] for f in report.findings] == [
        "Invalid __global__ write o",
        "Program hit cudaErrorLaunc",
    ]
    assert report.findings[0].during == "problem 2: Case(M=3, N=70)" and "planted.cu:9" in report.findings[0].text
    assert sanitize.parse(RACECHECK).errors == len(sanitize.parse(RACECHECK).findings) == 2
    assert sanitize.parse(CLEAN).findings == [] and sanitize.parse(CLEAN).trouble == ""
    assert "no summary" in sanitize.parse("========= COMPUTE-SANITIZER\n========= Error: no device\n").trouble
    unprinted = CLEAN.replace("0 errors", "7 errors") + "========= ERROR SUMMARY: 5 errors were not printed. Use --print-limit\n"
    assert sanitize.parse(unprinted).errors == 7


def fake(tmp_path, output: str, status: int = 0) -> str:
    """A compute-sanitizer that prints this whatever it is asked."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\nexit {status}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("output", "tool", "backend", "unexplained", "known"),
    [
        (CLEAN, "memcheck", "cuda", 0, 0),
        (MEMCHECK, "memcheck", "cuda", 2, 0),
        (RACECHECK, "racecheck", "cuda", 2, 0),
        (INITCHECK, "initcheck", "cuda", 1, 2),
        (INITCHECK, "initcheck", "ptx", 2, 1),  # one entry speaks of another backend
        (CLEAN.replace("0 errors", "3 errors"), "memcheck", "cuda", 3, 0),  # counted, not printed
    ],
)
def test_findings_are_known_or_unexplained(tmp_path, output, tool, backend, unexplained, known):
    row = sanitize.check(fake(tmp_path, output), tool, backend, "cuda:0")
    assert (row["unexplained"], sum(row["known"].values())) == (unexplained, known)
    assert row["ok"] == (unexplained == 0)


def test_several_at_a_time(tmp_path):
    """All of them, whoever is first."""
    runs = [(tool, "cuda") for tool in sanitize.TOOLS]
    rows = {row["tool"]: row for row in sanitize.check_all(fake(tmp_path, INITCHECK), runs, "cuda:0", processes=3)}
    unexplained = dict.fromkeys(sanitize.TOOLS, 3) | {"initcheck": 1}
    assert {tool: row["unexplained"] for tool, row in rows.items()} == unexplained


def test_a_run_that_ends_early_is_no_pass(tmp_path):
    row = sanitize.check(fake(tmp_path, CLEAN.replace(sanitize.DONE, "Segmentation fault"), 139), "memcheck", "cuda", "cuda:0")
    assert not row["ok"] and "ended early, exit status 139" in row["trouble"] and row["errors"] == 0


@pytest.mark.parametrize("bug", (*sanitize.TOOLS, "none"))
def test_plants_have_to_be_found_and_nothing_else(bug):
    found, nothing = sanitize.parse(MEMCHECK), sanitize.parse(CLEAN)
    assert sanitize.row_of_plant("memcheck", bug, found)["ok"] == (bug != "none")
    assert sanitize.row_of_plant("memcheck", bug, nothing)["ok"] == (bug == "none")


def test_planted_bugs_compile(tmp_path):
    try:
        program = sanitize.compile_planted(tmp_path, "sm_90")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    result = sanitize.subprocess.run([program, "typo"], capture_output=True, text=True)
    assert result.returncode == (2 if torch.cuda.is_available() else 3) and "planted: " in result.stderr


def test_problems_are_distinct_and_can_be_made():
    assert len(set(sanitize.PROBLEMS)) == len(sanitize.PROBLEMS) == 24
    for case in sanitize.PROBLEMS:
        inputs.make(case, sanitize.DTYPE, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_gpu(capsys):
    assert main(["sanitize"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert main(["sanitize", "--tool", "leakcheck"]) == 2
    assert "expected one of memcheck" in " ".join(capsys.readouterr().err.split())


def test_where_there_is_no_sanitizer(monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="compute-sanitizer is neither on PATH"):
        sanitize.find_sanitizer()
