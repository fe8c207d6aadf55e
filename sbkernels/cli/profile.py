"""`sbk profile`: one case under Nsight Compute or Nsight Systems, and what their reports say."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from rich.markup import escape

from .. import dispatch, env
from ..profiles import cases, diagnose, reader
from ..profiles.counters import COUNTERS
from ..verify import record
from .main import OK
from .shared import check_device, check_dtypes, out, shown, table

SHOWN_STALLS = 3


def profile(arguments) -> int:
    """Exit status 2 where the tool, the GPU or the case is missing."""
    if arguments.list:
        return show_cases()
    if (arguments.case is None) == (arguments.read is None):
        raise ValueError("expected a CASE or --read FILE, one of them; --list shows the cases")
    # A report that is only read here says nothing of this machine.
    circumstances = {"measured_here": arguments.read is None}
    if arguments.case is not None:
        path, what = run(arguments)
        circumstances |= what
    else:
        path = pathlib.Path(arguments.read)
    tool, rows = reader.read(path)
    if not rows:
        raise ValueError(f"{path} has no kernel")
    for row in rows if tool == "ncu" else ():
        row["diagnosis"] = diagnose.diagnosis(row)
    (show_counters if tool == "ncu" else show_summary)(rows, path)
    if arguments.json:
        record.write(arguments.json, "profile", rows, tool=tool, report=path.name, **circumstances)
        out.print(f"stored in {arguments.json}")
    return OK


def run(arguments) -> tuple[pathlib.Path, dict]:
    """Profile the case; (the tool's report, what was profiled). RuntimeError where the tool fails, whose words are printed."""
    check_dtypes([arguments.dtype])
    device = check_device(arguments.device)
    problem = cases.problem(arguments.case, arguments.dtype, device)
    if problem.device_type != "cuda":
        raise ValueError("Nsight watches kernels of a GPU: torch sees no CUDA device, or --device names none")
    backend = dispatch.choose_both(problem, arguments.backend)[0].backend.name
    name = re.sub(r"[^\w-]+", "_", f"{arguments.case}-{backend}-{arguments.direction}")
    default = env.cache_folder() / "profiles" / f"{name}{reader.SUFFIXES[arguments.tool]}"
    path = pathlib.Path(arguments.report).with_suffix(reader.SUFFIXES[arguments.tool]) if arguments.report else default
    path.parent.mkdir(parents=True, exist_ok=True)
    options = ("--backend", backend, "--direction", arguments.direction, "--dtype", arguments.dtype, "--device", device)
    # The tools add their suffix themselves; the script prints the command it makes of this.
    command = reader.script(arguments.tool, "record", str(path.with_suffix("")), arguments.case, *options)
    status = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}).returncode
    if status:
        raise RuntimeError(f"{arguments.tool} ended with exit status {status}; what it said is above")
    out.print(f"report: {path}")
    return path, {"case": arguments.case, "problem": str(problem), "backend": backend, "direction": arguments.direction}


def show_cases() -> int:
    """The named cases."""
    rows = table("cases: B, H or H/Hk, N or M/N, D or D/Dv", "name", "shape", "what it is")
    for name, (shape, meaning) in cases.CASES.items():
        rows.add_row(name, shape, meaning)
    out.print(rows)
    return OK


def show_counters(rows: list[dict], path: pathlib.Path) -> None:
    """Counters of each kernel side by side, then what they mean."""
    kernels = [f"{number} {row['kernel']}" for number, row in enumerate(rows, 1)]
    made = table(f"{path}: {len(rows)} kernels", "name", "unit", *map(escape, kernels), right=tuple(map(escape, kernels)))
    for counter in COUNTERS:
        made.add_row(counter.name, counter.unit, *(shown(row["counters"][counter.name], counter.form) for row in rows))
    reasons = dict.fromkeys(reason for row in rows for reason in list(row["stalls"])[:SHOWN_STALLS])
    for reason in reasons:
        made.add_row(f"waiting: {reason}", "warps", *(shown(row["stalls"].get(reason), ".2f") for row in rows))
    out.print(made)
    for kernel, row in zip(kernels, rows, strict=True):
        out.print(f"[bold]{escape(kernel)}[/bold]  {escape(row['name'])}", soft_wrap=True)
        for line in row["diagnosis"]:
            out.print(f"  {escape(line)}")


def show_summary(rows: list[dict], path: pathlib.Path) -> None:
    """Kernels by their share of the time."""
    numbers = ("% of the time", "calls", "total us", "median us")
    made = table(f"{path}: {len(rows)} kernels", "kernel", *numbers, right=numbers)
    for row in rows:
        values = zip((row["share"], row["calls"], row["total"], row["median"]), (".1f", ".0f", ".1f", ".1f"), strict=True)
        made.add_row(escape(row["kernel"]), *(shown(*value) for value in values))
    out.print(made)
