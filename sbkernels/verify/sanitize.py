"""compute-sanitizer over a fixed set of problems, forward and backward; and proof that each of its tools finds what it is for.

`python -m sbkernels.verify.sanitize BACKEND DEVICE` runs the set: it is the process the tools watch. Every tensor has memory of its
own there and no guard around it, so that a byte beyond one is seen. The extension has to be built with SBKERNELS_CHECKED=1 for
racecheck and synccheck to follow the barriers of its Hopper kernels: csrc/hopper.cuh.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch

from .. import registry
from . import inputs, run
from .inputs import Case

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
DTYPE = torch.bfloat16
DEADLINE_SECONDS = 3600.0  # of one tool over all problems of one backend: they run up to 100 times as long as without
OPTIONS = ("--show-backtrace", "device", "--print-limit", "1000000")  # else it stops printing at 100
# NOTE: by itself synccheck finds room for fewer mbarriers than a block of Hopper's backward has, and the kernel then fails.
TOOL_OPTIONS = {"synccheck": ("--num-cuda-barriers", "128")}
DONE = "all problems ran"
PLANTED = pathlib.Path(__file__).with_name("planted.cu")
PROBLEMS = [
    Case(M=1, N=1), Case(M=1, N=2, attend_current=True), Case(M=3, N=70), Case(M=63, N=65, attend_current=True),
    Case(M=129, N=129, skip=True), Case(M=200, N=333, D=64, Dv=64), Case(M=150, N=150, D=50, Dv=80),
    Case(M=97, N=97, D=80, Dv=50), Case(M=130, N=257, H=6, D=128, Dv=128, layout="packed"),
    Case(M=90, N=100, B=2, D=24, Dv=16, layout="bnhd"), Case(M=70, N=131, D=256, Dv=192),
    Case(lengths=(33, 0, 1, 64, 130), H=4, D=128, Dv=64, skip=True),
    Case(lengths=(65, 2, 128), Hk=1, attend_current=True), Case("std30", M=190, N=190, D=64, Dv=64, skip=True),
    Case(M=100, N=100, strides=("offset", "sliced", "broadcast", "scalar")), Case("fading", M=300, N=300, skip=True),
    # Tiles that Hopper's kernels load whole, pair by pair, and that no query visits:
    Case(M=256, N=256, H=4, D=128, Dv=128), Case(M=256, N=256, Hk=1, D=64, Dv=64),
    Case(B=2, M=384, N=384, D=64, Dv=64, attend_current=True, layout="bnhd", skip=True),
    Case("std30", M=256, N=256, Hk=1, D=64, Dv=64, skip=True), Case("std30", M=100, N=1000, D=64, Dv=64, skip=True),
    Case(B=2, M=301, N=301, H=4, D=128, Dv=96, layout="bnhd"), Case("std30", M=190, N=300, Hk=1, D=192, Dv=256, skip=True),
    Case(M=256, N=256, D=256, Dv=256, attend_current=True),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Known:
    """Findings that are no bugs, and why: those of a tool on one of these backends whose text has all of these patterns."""

    tool: str
    backends: tuple[str, ...]
    patterns: tuple[str, ...]
    reason: str

    def explains(self, tool: str, backend: str, text: str) -> bool:
        return tool == self.tool and backend in self.backends and all(re.search(pattern, text) for pattern in self.patterns)


LEDGER = [
    Known(
        "initcheck", ("cuda",), (r"\AUninitialized __global__ memory read", r"\bconvert_dq\b"),
        "It reads the sums of dq, which the copy engine has written (store_bulk and reduce_add in csrc/hopper.cuh): initcheck does "
        "not see that. `sbk verify` fills them with NaN before.",
    ),
    Known(
        "initcheck", ("cuda", "ptx"),
        (r"\AUninitialized __global__ memory read", r"(?s)\A(?!.*\bload_tile\b).*\bcopy_async_16\b.*\bbackward_keys_kernel\b"),
        "It loads the state of all groups of keys of its tile; of those that no row of a block of queries sees there is none, and "
        "it passes over them. `sbk verify` fills it with NaN before.",
    ),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
    """One message of a tool: its text, and the problem that ran when it came."""

    text: str
    during: str

    @property
    def headline(self) -> str:
        return self.text.splitlines()[0]


@dataclasses.dataclass
class Report:
    """What a tool said of a process: findings, how many errors it counts, and what kept it from an answer, if anything did."""

    findings: list[Finding]
    errors: int
    trouble: str = ""
    seconds: float = 0.0


def parse(output: str) -> Report:
    """Read what compute-sanitizer and the process it watched have printed."""
    findings, block, during, errors = [], [], "", None
    for line in [*output.splitlines(), "========="]:
        said = re.match(r"=========(?: (.*))?$", line)
        if said is None:
            if line.startswith("problem "):
                during = line
            continue
        text = (said[1] or "").rstrip()
        summary = re.match(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)s?\b(?! were not printed)", text)
        if summary:
            errors = int(summary[1])
        if text and not summary and not re.match(r"COMPUTE-SANITIZER|Target application|.* SUMMARY:", text):
            if not text.startswith(" ") and block:  # a new message without an empty line before it
                findings.append(Finding("\n".join(block), during))
                block = []
            block.append(text)
        elif block:
            findings.append(Finding("\n".join(block), during))
            block = []
    if errors is None:
        return Report(findings, 0, "no summary: " + " | ".join(output.splitlines()[-5:]))
    return Report(findings, errors)


def find_sanitizer() -> str:
    """Path of compute-sanitizer; FileNotFoundError in words."""
    return _find("compute-sanitizer", "it comes with the CUDA toolkit")


def _find(program: str, hint: str) -> str:
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = shutil.which(program) or shutil.which(program, path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))
    if path is None:
        raise FileNotFoundError(f"{program} is neither on PATH nor in CUDA_HOME, CUDA_PATH or /usr/local/cuda: {hint}")
    return path


def compile_planted(folder: pathlib.Path, architecture: str) -> pathlib.Path:
    """Compile planted.cu for sm_80, sm_90, ...; RuntimeError with what nvcc says."""
    target = folder / "planted"
    nvcc = _find("nvcc", "it compiles the bugs that each tool has to find")
    result = subprocess.run([nvcc, "-lineinfo", f"-arch={architecture}", "-o", target, PLANTED], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvcc does not compile {PLANTED}:\n{result.stderr}")
    return target


def watch(sanitizer: str, tool: str, command: list, done: str = "") -> Report:
    """Run a command under a tool; done: a line without which it has not come to its end."""
    words = [sanitizer, "--tool", tool, *OPTIONS, *TOOL_OPTIONS.get(tool, ()), *map(str, command)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.monotonic()
    try:
        result = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=DEADLINE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Report([], 0, f"no end in {DEADLINE_SECONDS:g} s", time.monotonic() - begin)
    report = parse(result.stdout)
    report.seconds = time.monotonic() - begin
    if not report.trouble and done and done not in result.stdout.splitlines():
        report.trouble = f"ended early, exit status {result.returncode}: " + " | ".join(result.stdout.splitlines()[-5:])
    return report


def plants(sanitizer: str, tools: tuple[str, ...], architecture: str):
    """(tool, bug, Report) of every tool on its planted bug, and on a program without one."""
    with tempfile.TemporaryDirectory() as folder:
        program = compile_planted(pathlib.Path(folder), architecture)
        for tool in tools:
            for bug in (tool, "none"):
                yield tool, bug, watch(sanitizer, tool, [program, bug])


def row_of_plant(tool: str, bug: str, report: Report) -> dict:
    """A row of a record; ok: found where there is one, and only there."""
    ok = not report.trouble and (report.errors > 0) == (bug != "none")
    return {"tool": tool, "bug": bug, "errors": report.errors, "ok": ok, "trouble": report.trouble, "seconds": report.seconds}


def check(sanitizer: str, tool: str, backend: str, device: str) -> dict:
    """A row of a record: a tool over all problems of a backend; ok where all of what it found is in the ledger."""
    report = watch(sanitizer, tool, [sys.executable, "-m", __name__, backend, device], DONE)
    known, unexplained = collections.Counter(), []
    for finding in report.findings:
        entry = next((i for i, known_ in enumerate(LEDGER) if known_.explains(tool, backend, finding.text)), None)
        if entry is None:
            unexplained.append(finding)
        else:
            known[entry] += 1
    loaded, _ = registry.try_load(backend)
    versions = loaded.versions() if loaded else {}
    # What was counted and not printed is not explained.
    hidden = max(0, report.errors - len(report.findings))
    return {
        "backend": backend,
        "tool": tool,
        "cases": len(PROBLEMS),
        "errors": report.errors,
        "unexplained": len(unexplained) + hidden,
        "known": dict(known),
        "findings": [{"text": f.text, "during": f.during} for f in unexplained[:20]],
        "versions": versions,
        "trouble": report.trouble,
        "ok": not unexplained and not hidden and not report.trouble,
        "seconds": report.seconds,
    }


def check_all(sanitizer: str, runs: list[tuple[str, str]], device: str, processes: int = 1) -> Iterator[dict]:
    """A row for each (tool, backend) as they come, of so many processes at a time."""
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:  # threads that wait for processes
        try:
            waiting = [pool.submit(check, sanitizer, *run, device) for run in runs]
            yield from (done.result() for done in concurrent.futures.as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def main(backend: str, device: str) -> None:
    """All problems on one backend in this process, and in this thread: one of autograd's that it ends in the middle aborts it."""
    torch.autograd.set_multithreading_enabled(False)
    for number, case in enumerate(PROBLEMS, 1):
        print(f"problem {number}: {case}", flush=True)
        x = inputs.make(case, DTYPE, device)
        with run.use_backend(backend):
            run.attend(x, guarded=False)
        torch.cuda.synchronize(device)
    print(DONE, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
