"""`sbk bench`: speed of every backend on sets of problems, beside its peers and beside what the machine can do."""

from __future__ import annotations

import dataclasses
import time

import torch
from rich.markup import escape

from .. import environment
from ..bench import clock, contenders, limits, readme, regress, run, sets
from ..bench.rows import Row
from ..dispatch import BackendError, availability_text
from ..problem import DTYPES
from ..verify import record
from ..verify.run import targets
from .main import EXCEEDED, INTERRUPTED, OK, REFUSED
from .shared import backend_names, check_device, out, progress_bar, shown, table

NOTHING = "none"
JOINED = {regress.SAME: "as", regress.FASTER: "than", regress.SLOWER: "than", regress.UNSURE: "beside"}


def bench(arguments) -> int:
    """Exit status 1 where a backend failed, was wrong, or is slower than in the record it is held against."""
    if arguments.readme:
        out.print("README.md was rewritten" if readme.rewrite() else "README.md says what the records say")
        return OK
    device = check_device(arguments.device)
    names = backend_names(arguments.backend)
    cases = chosen(sets.of(arguments.set or sets.default(device), device), arguments.case)
    peers = beside(arguments.beside, device)
    seconds = 60 * positive("--minutes", arguments.minutes, default=float("inf"))
    sustained = positive("--sustained", arguments.sustained, default=0.0)
    old = regress.load(arguments.against) if arguments.against else None
    found, missing = targets(device, names)
    backends = [backend.name for backend, variant in found if not variant]
    if not backends:
        raise BackendError(f"no backend to measure on {device}\n{availability_text()}")
    reader, why = clock.of(device, declared(arguments.clock, device))
    where = {"device": device, "threads": torch.get_num_threads(), "environment": environment.describe()}
    if old:
        regress.check_machine(old, where)
    stopped = None
    with progress_bar() as bar:
        task = bar.add_task("limits of the machine", total=sum(len(case.directions) for case in cases))
        found_limits = limits.measure(device, DTYPES[cases[0].dtype])
        measured = run.Bench(device, backends, peers, found_limits, reader, time.monotonic() + seconds, sustained)
        measured.progress = lambda *what: bar.update(task, completed=len(measured.canary.samples), description=" ".join(what))
        try:
            measured.run(cases)
        except KeyboardInterrupt:
            stopped = "interrupted"
        except (RuntimeError, OSError) as error:  # what was measured before is kept
            stopped = str(error)
    content = where | content_of(arguments.set or sets.default(device), measured)
    show(measured, why)
    for name, reason in missing.items():
        out.print(f"cannot run here: {name}: {escape(reason)}")
    if arguments.json:
        rest = {name: value for name, value in content.items() if name != "environment"}
        record.write(arguments.json, "bench", measured_in=where["environment"], **rest)
        out.print(f"stored in {arguments.json}")
    verdicts = regress.against(old, content) if old and measured.rows else []
    if verdicts:
        show_verdicts(verdicts, device)
    if stopped:
        out.print(f"{escape(stopped)}: the problems above are complete, the others were not measured")
        return INTERRUPTED if stopped == "interrupted" else REFUSED
    slower = any(verdict.word == regress.SLOWER for _, verdict in verdicts)
    return EXCEEDED if slower or not all(row.ok for row in measured.rows) else OK


def chosen(cases: list[sets.Case], parts: list[str] | None) -> list[sets.Case]:
    """Cases whose names hold one of --case; ValueError if one of them is in no name."""
    for part in parts or ():
        if not any(part in case.name for case in cases):
            raise ValueError(f"--case {part!r}: expected a part of one of {'; '.join(case.name for case in cases)}")
    return [case for case in cases if not parts or any(part in case.name for part in parts)]


def beside(asked: list[str] | None, device: str) -> tuple[str, ...]:
    """Contenders that are not ours: --beside, or all; ValueError for an unknown one."""
    known = run.beside(device)
    for name in asked or ():
        if name not in (*known, NOTHING):
            installed = "" if contenders.AUTHORS in known else f" ({contenders.AUTHORS}: its package is not installed)"
            raise ValueError(f"--beside {name!r}: expected one of {', '.join((*known, NOTHING))}{installed}")
    return tuple(name for name in known if not asked or name in asked)


def positive(name: str, asked: float | None, default: float) -> float:
    """An option's number, or its default; ValueError unless it is positive."""
    if asked is not None and not asked > 0:
        raise ValueError(f"{name} {asked:g}: expected more than 0")
    return default if asked is None else asked


def declared(asked: float | None, device: str) -> float | None:
    """--clock; ValueError unless it is positive and of a GPU."""
    if asked is not None and (not asked > 0 or device == "cpu"):
        raise ValueError(f"--clock {asked:g}: expected MHz above 0, of a GPU; the device is {device}")
    return asked


def content_of(name: str, measured: run.Bench) -> dict:
    """What is stored of a run besides where it ran."""
    reader = measured.clock
    return {
        "set": name,
        "limits": dataclasses.asdict(measured.limits),
        "clock": {"declared_mhz": reader.declared, "highest_mhz": reader.highest} if reader else None,
        "canary": measured.canary.record(),
        "sustained_seconds": measured.sustained or None,
        "rows": [dataclasses.asdict(row) for row in measured.rows],
    }


def show(measured: run.Bench, why_no_clock: str) -> None:
    """The tables: one for each problem."""
    found = measured.limits
    gops = "not measured" if found.special_function_gops is None else f"{found.special_function_gops:.0f} G/s"
    where = f"cpu, threads: {torch.get_num_threads()}" if measured.device == "cpu" else measured.device
    out.print(
        f"{where}: at most {found.tensor_tflops:.3g} TFLOP/s in products, special functions {gops}, memory "
        f"{found.memory_gbs:.0f} GB/s {found.note}"
    )
    softmax = [name for name in contenders.SOFTMAX if any(name in row.ratios for row in measured.rows)]
    beside_softmax = (f"x {name}".replace("Attention", "-\nAttention") for name in softmax)
    numbers = ("ms", "+- %", "TFLOP/s", "% of limit", *beside_softmax, "warm ms", "MiB")
    for case in dict.fromkeys(row.case for row in measured.rows):
        rows = [row for row in measured.rows if row.case == case]
        made = table(f"{case}, {rows[0].dtype}: {rows[0].inputs}", "backend", "pass", *numbers, right=numbers)
        for row in rows:
            if row.ms is None:
                continue
            low, high = row.interval
            cells = [f"{row.ms:.4g}", f"{50 * (high - low) / row.ms:.1f}", f"{row.tflops:.3g}"]
            cells.append(f"{100 * row.of_limit:.0f} {row.limit.removesuffix(' function')}")
            cells += [shown(row.ratios.get(name), ".2f") for name in softmax]
            cells += [shown(row.warm_ms, ".4g"), shown(row.peak_bytes and row.peak_bytes / 2**20, ".0f")]
            made.add_row(row.contender, row.direction, *cells)
        if made.row_count:
            out.print(made)
        for direction in dict.fromkeys(row.direction for row in rows):
            out.print(fastest([row for row in rows if row.direction == direction and row.ms is not None]), style="dim")
        notes = {}
        for row in rows:
            if row.note:
                notes.setdefault((row.note, row.ok), {}).setdefault(row.contender, []).append(row.direction)
            if row.sustained:
                notes.setdefault((f"over and over {row.sustained}", row.ok), {}).setdefault(row.contender, []).append(row.direction)
        for (note, ok), who in notes.items():
            names = "; ".join(f"{contender} {', '.join(directions)}" for contender, directions in who.items())
            out.print(f"  {names}: {escape(note)}", style="dim" if ok else "red")
        out.print()
    caches = "as the turns leave the caches" if measured.device == "cpu" else "from a cold L2"
    out.print(f"ms: median, in turns, {caches}; +-: half its 95 % interval; TFLOP/s of the causal half.", style="dim")
    out.print("% of limit: the least time that products (tensor), special functions or memory allow, over the time.", style="dim")
    out.print("x softmax attention (torch's SDPA, same run): its time over this one's, above 1 this one is faster.", style="dim")
    if measured.sustained:
        out.print(f"over and over: alone for {measured.sustained:g} s; mean SM clock and board power meanwhile.", style="dim")
    if why_no_clock:
        out.print(why_no_clock, style="dim")
    for name, reason in measured.left_out.items():
        out.print(f"left out: {name}: {escape(reason)}")


def fastest(rows: list[Row]) -> str:
    """How the fastest of ours stands beside each of the others, by the samples of the same turns."""
    ours = min((row for row in rows if row.ours), key=lambda row: row.ms, default=None)
    if ours is None:
        return "  none of ours was timed"
    found = []
    for row in rows:
        if row is not ours:
            verdict = regress.in_turns(row.samples, ours.samples)
            ratio = "" if verdict.low is None else f" ({verdict.low:.3f} to {verdict.high:.3f} of its time)"
            found.append(f"{verdict.word} {JOINED[verdict.word]} {row.contender}{ratio}")
    return f"  {ours.direction}: {ours.contender}{' is ' if found else ''}{', '.join(found)}"


def show_verdicts(verdicts, device: str) -> None:
    """How our rows stand beside an earlier run's."""
    made = table("beside the record", "backend", "pass", "problem", "verdict", "time, new over old", "")
    for row, verdict in verdicts:
        ratio = "-" if verdict.low is None else f"{verdict.low:.3f} to {verdict.high:.3f}"
        made.add_row(row["contender"], row["direction"], row["case"], verdict.word, ratio, escape(verdict.why))
    out.print(made)
    counts = [f"{sum(v.word == word for _, v in verdicts)} {word}" for word in regress.WORDS]
    out.print(", ".join(counts))
    equal = regress.EQUAL_RUNS["cpu" if device == "cpu" else "cuda"]
    out.print(f"SLOWER and FASTER: by more than {regress.WORTH:.0%}; SAME: by less than {equal:.0%}; at 99 %.", style="dim")
