"""Profiles: what is read from reports, what it is taken to mean, what the scripts run, ranges. No test needs a GPU or Nsight.

tests/data/ncu-raw.csv was printed by ncu 2025.3 on an H100 for `sbk profile train-4k-64`. ncu-odd.csv, with spills, gaps and other
units, and nsys-kernels.csv are written by hand in the tools' formats: their numbers are nobody's measurement.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from sbkernels import env, nvtx
from sbkernels.cli import profile as profiling
from sbkernels.cli.main import main
from sbkernels.problem import Problem
from sbkernels.profiles import cases, counters, diagnose, reader, run_case

DATA = pathlib.Path(__file__).parent / "data"
RECORDED, ODD, NSYS = DATA / "ncu-raw.csv", DATA / "ncu-odd.csv", DATA / "nsys-kernels.csv"


def test_what_ncu_recorded_is_read():
    """Every counter that is asked for is there."""
    tool, rows = reader.read(RECORDED)
    names = ["hopper_forward", "hopper_backward_begin", "hopper_backward", "hopper_backward_end"]
    assert tool == "ncu" and [row["kernel"] for row in rows] == names
    assert all(value is not None for row in rows for value in row["counters"].values())
    forward, _, backward, _ = rows
    assert forward["counters"]["time"] == 851.328 and forward["counters"]["special-function pipe (XU)"] == 42.9347
    assert list(backward["stalls"])[:2] == ["long_scoreboard", "wait"]
    assert "L2 68 %: traffic between L2 and shared memory may hold it up" in diagnose.diagnosis(backward)


def test_odd_reports_are_read():
    tool, (forward, backward, fill) = reader.read(ODD)
    assert tool == "ncu" and [row["kernel"] for row in (forward, backward)] == ["hopper_forward", "hopper_backward"]
    assert fill["kernel"] == "vectorized_elementwise" and fill["name"].startswith("void at::native::")
    assert backward["counters"]["time"] == 2714.05 and backward["counters"][counters.CONFLICTS] == 18874368
    assert fill["counters"]["FMA pipe"] is None and fill["counters"][counters.LOADS] is None  # "n/a", and nothing
    assert list(forward["stalls"])[:2] == ["math_pipe_throttle", "wait"] and "selected" not in forward["stalls"]


@pytest.mark.parametrize(("unit", "microseconds"), [("ns", 0.25), ("us", 250), ("msecond", 250e3), ("second", 250e6)])
def test_times_come_in_any_unit(unit, microseconds):
    text = f'"ID","Kernel Name","gpu__time_duration.sum"\n"","","{unit}"\n"0","f(int)","250.00"\n'
    _, (row,) = reader.parse(text, "test")
    assert row["counters"]["time"] == pytest.approx(microseconds)


def test_any_subset_is_read():
    """No metric that is known, no row of units, no kernel."""
    _, (row,) = reader.parse('"ID","Kernel Name","other"\n"0","f","1"\n', "test")
    assert not any(row["counters"].values()) and row["stalls"] == {} and diagnose.diagnosis(row) == []
    assert reader.parse('"ID","Kernel Name"\n', "test") == ("ncu", [])
    with pytest.raises(ValueError, match=r"is no report: expected .ncu-rep or .nsys-rep"):
        reader.parse("==ERROR== The user does not have permission\n", "test")


def test_nsys_is_read():
    tool, rows = reader.read(NSYS)
    assert tool == "nsys" and [row["kernel"] for row in rows][:2] == ["hopper_backward", "hopper_forward"]
    assert rows[2]["calls"] == 12 and rows[2]["median"] == pytest.approx(2.91) and rows[0]["share"] == 76.2


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void sbk::kernel<A<int>, 2>(Params)", "kernel"), ("_forward_kernel", "_forward"),
        ("(anonymous namespace)::f<1>((anonymous namespace)::P)", "f"), ("<lambda>", "<lambda>"),
    ],
)  # fmt: skip
def test_short_names(name, short):
    assert reader.short(name) == short


def test_diagnosis():
    """A line for each limit: what fills it, what waits where nothing does, spills, conflicts."""
    _, (forward, backward, fill) = reader.read(ODD)
    assert "special-function pipe (XU) 91 %: bound by the logit stage" in diagnose.diagnosis(forward)
    assert "no spills" in diagnose.diagnosis(forward) and "tensor pipe 35 %: not the limit" in diagnose.diagnosis(forward)
    lines = diagnose.diagnosis(backward)
    assert "no unit above 60 %: bound by latency: 61 % of waiting warps wait for global or local memory, or L2" in "\n".join(lines)
    assert "spills: 16,896 instructions" in lines and "bank conflicts 20 % of shared memory's wavefronts: too many" in lines
    assert "DRAM 71 %: memory traffic may hold it up" in diagnose.diagnosis(fill)


def test_limits_are_counted():
    assert {limit.counter for limit in counters.LIMITS} <= {counter.name for counter in counters.COUNTERS}


def test_command(tmp_path, capsys):
    stored = tmp_path / "profile.json"
    assert main(["profile", "--read", str(ODD), "--json", str(stored)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "special-function pipe (XU) % 91.2 40.1 0.0" in shown and "FMA pipe % 38.4 21.7 -" in shown
    content = json.loads(stored.read_text())
    assert content["kind"] == "profile" and content["environment"]["sources"] and content["rows"][0]["diagnosis"]
    assert main(["profile", "--read", str(NSYS)]) == 0 and "76.2" in capsys.readouterr().out
    assert main(["profile", "--list"]) == 0 and "decode-8k-128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "expected a CASE or --read FILE"), (("launch", "--read", "x"), "expected a CASE or --read FILE"),
        (("--read", "/none"), "there is no file /none"), (("none", "--device", "cpu"), "expected one of train-1k-128"),
        (("launch", "--device", "cpu"), "Nsight watches kernels of a GPU"), (("launch", "--dtype", "int4"), "expected one of"),
    ],
)  # fmt: skip
def test_command_refuses(arguments, words, capsys):
    assert main(["profile", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_cases():
    for name in cases.CASES:
        assert cases.problem(name, "bfloat16", "cpu").skip is False
    assert cases.problem("1,4/2,8/16,32/64", "float16", "cpu").value_dim == 64


def test_a_case_is_run(monkeypatch):
    """On a CPU there is no range; each pass runs once more than it is warmed up."""
    calls = []
    monkeypatch.setattr(
        run_case.calls, "passes", lambda x: {name: lambda name=name: calls.append(name) for name in run_case.DIRECTIONS}
    )
    run_case.main(["1,1,8,16", "--backend", "torch", "--dtype", "float32", "--device", "cpu"])
    assert calls == ["forward", "backward"] * (run_case.WARMUP_CALLS + 1)
    calls.clear()
    run_case.main(["1,1,8,16", "--direction", "backward", "--dtype", "float32", "--device", "cpu"])
    assert set(calls) == {"backward"}


def test_the_range_holds_what_is_measured(monkeypatch):
    """From start to end, which is every thread's."""
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: said.append("profiler on"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: said.append("profiler off"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: said.append(name) or 7)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", lambda number: said.append(number))
    with run_case.watched("cuda:0"):
        said.append("case")
    assert said == ["wait", "profiler on", counters.RANGE, "case", "wait", 7, "profiler off"]


def scripted(tool: str, *words: str, path: str) -> subprocess.CompletedProcess:
    settings = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    command = reader.script(tool, *words)
    return subprocess.run(command, capture_output=True, text=True, env=settings | {"PATH": path, "PYTHON": sys.executable})


@pytest.mark.parametrize(
    ("tool", "record", "read"),
    [
        ("ncu", ("--clock-control none", "--nvtx-include sbkernels-case", "--target-processes all", "--import-source yes"),
         "--import x.rep --page raw --csv"),
        ("nsys", ("-c cudaProfilerApi", "-t cuda,nvtx", "--capture-range-end stop"), "--report cuda_gpu_kern_sum --format csv"),
    ],
)  # fmt: skip
def test_scripts(tmp_path, tool, record, read):
    """A tool that prints its arguments: the script says what it runs before it does."""
    (tmp_path / tool).write_text('#!/bin/sh\necho "ran $*"\n')
    (tmp_path / tool).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = scripted(tool, "record", "x.rep", "launch", "--backend", "cuda", path=path)
    command, ran = result.stdout.splitlines()
    assert command.startswith(tool) and all(words in " ".join(shlex.split(command)) and words in ran for words in record), (
        result.stderr
    )
    assert ran.endswith("-m sbkernels.profiles.run_case launch --backend cuda")
    if tool == "ncu":
        assert all(counter.metric in ran for counter in counters.COUNTERS)
    assert read in scripted(tool, "read", "x.rep", path=path).stdout


@pytest.mark.parametrize(("tool", "package"), [("ncu", "nsight-compute"), ("nsys", "nsight-systems-cli")])
def test_a_missing_tool_is_named_with_its_package(tmp_path, tool, package, monkeypatch, capsys):
    bare = "/usr/bin:/bin"
    if shutil.which(tool, path=f"{bare}:/usr/local/cuda/bin"):
        pytest.skip(f"{tool} is installed where it cannot be hidden")
    result = scripted(tool, "record", "x", "launch", path=bare)
    assert result.returncode == 2 and package in result.stderr
    report = tmp_path / f"x{reader.SUFFIXES[tool]}"
    report.touch()
    monkeypatch.setenv("PATH", bare)
    assert main(["profile", "--read", str(report)]) == 2 and package in capsys.readouterr().err


FAKE = """#!/bin/sh
[ "$1" = --import ] && exec cat {csv}
while [ $# -gt 0 ]; do [ "$1" = --export ] && : > "$2.ncu-rep"; shift; done
exit {status}
"""


@pytest.mark.parametrize("status", [0, 9])
def test_a_case_is_profiled(tmp_path, monkeypatch, capfd, status):
    """As on a GPU, with a tool that records nothing: the command is printed and run, its report read, a record stored."""
    (tmp_path / "ncu").write_text(FAKE.format(csv=ODD, status=status))
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(profiling, "check_device", lambda device: "cuda:0")
    monkeypatch.setattr(profiling.dispatch, "choose_both", lambda problem, backend: (Choice(Backend()),) * 2)
    stored = tmp_path / "record.json"
    assert main(["profile", "decode-8k-128", "--json", str(stored)]) == (2 if status else 0)
    said = capfd.readouterr()
    assert "run_case decode-8k-128 --backend planted --direction both --dtype bfloat16 --device cuda:0" in said.out
    if status:
        assert "ncu ended with exit status 9" in said.err and not stored.exists()
        return
    content = json.loads(stored.read_text())
    assert (tmp_path / "cache" / "profiles" / "decode-8k-128-planted-both.ncu-rep").exists()
    assert content["measured_here"] and content["case"] == "decode-8k-128" and len(content["rows"]) == 3


class Backend:
    name = "planted"

    def forward(self, *arguments):
        return ("forward", arguments)

    def backward(self, *arguments):
        return ("backward", arguments)


@dataclasses.dataclass(frozen=True)
class Choice:
    backend: object


def test_passes_are_ranges_only_where_asked(monkeypatch):
    ranges = []

    class Range:
        def __init__(self, name):
            ranges.append(name)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch.cuda.nvtx, "range", Range)
    on_gpu, on_cpu = (Problem(1, 2, 2, 8, 8, 16, 16, "float16", device) for device in ("cuda:0", "cpu"))
    choice = Choice(Backend())
    monkeypatch.delenv(env.NVTX, raising=False)
    assert nvtx.annotated(choice, on_gpu) is choice
    monkeypatch.setenv(env.NVTX, "1")
    assert nvtx.annotated(choice, on_cpu) is choice
    annotated = nvtx.annotated(choice, on_gpu).backend
    assert (
        annotated.name == "planted"
        and annotated.forward(1) == ("forward", (1,))
        and annotated.backward(2, 3) == ("backward", (2, 3))
    )
    assert len(ranges) == 2 and ranges[0].startswith("sbkernels planted forward B=1 H=2")
    monkeypatch.setenv(env.NVTX, "yes")
    with pytest.raises(ValueError, match="SBKERNELS_NVTX='yes' is neither 0 nor 1"):
        nvtx.annotated(choice, on_gpu)
