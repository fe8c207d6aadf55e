"""`sbk sanitize`: compute-sanitizer's four tools over a fixed set of problems, each shown to find its planted bug."""

from __future__ import annotations

import dataclasses

import torch
from rich.markup import escape

from .. import registry
from ..verify import record, run
from ..verify import sanitize as sanitizing
from .main import EXCEEDED, OK
from .shared import backend_names, check_device, out, table


def sanitize(arguments) -> int:
    """Exit status 1 when a tool finds what the ledger does not explain, or does not find what was planted."""
    tools = tuple(arguments.tool or sanitizing.TOOLS)
    for tool in tools:
        if tool not in sanitizing.TOOLS:
            raise ValueError(f"--tool {tool!r}: expected one of {', '.join(sanitizing.TOOLS)}")
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes}: expected at least 1")
    device = check_device(arguments.device)
    if device == "cpu":
        raise ValueError("compute-sanitizer watches kernels of a GPU: torch sees no CUDA device, or --device names none")
    sanitizer = sanitizing.find_sanitizer()
    problem = run.probe(device, sanitizing.DTYPE)
    names = backend_names(arguments.backend) or [name for name in registry.names() if name != "torch"]  # whose kernels are not ours
    major, minor = torch.cuda.get_device_capability(device)
    planted = []
    for plant in sanitizing.plants(sanitizer, tools, f"sm_{major}{minor}"):
        planted.append(sanitizing.row_of_plant(*plant))
        row = planted[-1]
        what = "a program without a bug" if row["bug"] == "none" else "its planted bug"
        out.print(f"{row['tool']} on {what}: {row['errors']} errors{'' if row['ok'] else ', WRONG'} {escape(row['trouble'])}")
    rows, runs = [], []
    for name in names:
        backend, reason = registry.try_load(name)
        reason = reason or backend.unsupported(problem)
        if reason:
            out.print(f"cannot run here: {name}: {escape(reason)}")
            continue
        runs += [(tool, name) for tool in tools]
    for row in sanitizing.check_all(sanitizer, runs, device, arguments.processes):
        rows.append(row)
        known = sum(row["known"].values())
        said = f"{row['errors']} errors, {known} of them known, {row['unexplained']} unexplained"
        where = f"{row['tool']}, {row['backend']}"
        out.print(f"{where}: {said}, {row['cases']} problems in {row['seconds']:.0f} s {escape(row['trouble'])}")
        for finding in row["findings"][:3]:
            out.print(f"  {finding['during']}\n{finding['text']}", markup=False)
    made = table("known false alarms", "tool", "backend", "seen", "why they are", right=("seen",))
    for index, known in enumerate(sanitizing.LEDGER):
        seen = sum(row["known"].get(index, 0) for row in rows)
        made.add_row(known.tool, ", ".join(known.backends), str(seen), escape(known.reason))
    out.print(made)
    if arguments.record:
        ledger = [dataclasses.asdict(known) for known in sanitizing.LEDGER]
        record.write(arguments.record, "sanitize", rows, device=device, planted=planted, ledger=ledger)
        out.print(f"recorded in {arguments.record}")
    if not rows:
        raise ValueError(f"no backend with kernels of its own runs on {device}")
    if any(row["backend"] == "cuda" and not row["ok"] and "CHECKED" not in str(row["versions"]) for row in rows):
        out.print("cuda: racecheck and synccheck follow Hopper's barriers only in an extension built with SBKERNELS_CHECKED=1")
    wrong = sum(not row["ok"] for row in (*planted, *rows))
    out.print(f"{len(planted) + len(rows) - wrong} of {len(planted) + len(rows)} as expected")
    return EXCEEDED if wrong else OK
