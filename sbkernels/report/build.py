"""The page of stored results: its sections in order, the numbers at its head, where everything was measured."""

from __future__ import annotations

import math

from ..markup import table
from . import correctness, performance, points, tuned
from .page import Section, Tile, details, note, render
from .stored import Stored


def build(stored: Stored) -> str:
    """The page. RuntimeError where the charts' library is missing."""
    timed = points.points(stored)
    sections = [
        performance.speed(stored, timed), performance.roofline(stored, timed), correctness.errors(stored), tuned.tuning(stored),
        correctness.verify(stored), performance.profiles(stored), machines(stored),
    ]  # fmt: skip
    days = sorted({record.environment["time"][:10] for record in stored.records})
    measured = "" if not days else f", measured on {days[0]}" if len(days) == 1 else f", measured from {days[0]} to {days[-1]}"
    names = ", ".join(dict.fromkeys(record.machine for record in sorted(stored.records, key=lambda record: not record.on_gpu)))
    subtitle = f"Kernels of sbkernels beside softmax attention and beside float64{measured}. Machines: {names or 'none'}."
    return render([section for section in sections if section], tiles(stored, timed), subtitle)


def tiles(stored: Stored, timed: dict[str, list[points.Point]]) -> list[Tile]:
    """The few numbers to take away, those of them that are stored."""
    found = []
    for machine, mine in list(timed.items())[:1]:
        kept = [p for way in performance.PASSES for curve in points.curves(mine, way).values() for p in curve]
        best = points.fastest(kept)
        for way in performance.PASSES:
            ours = [p for p in kept if p.contender == best and p.direction == way]
            if ours:
                top = max(ours, key=lambda p: p.tflops)
                where = f"{best}, D = {top.D}, N = {points.short(top.N)}, {machine}"
                found.append(Tile(f"{top.tflops:.0f} TFLOP/s", f"{way} at best: {where}"))
        ratios = [p.ratios["FlashAttention-2"] for p in kept if p.contender == best and "FlashAttention-2" in p.ratios]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            found.append(Tile(f"{mean:.2f} x", f"FlashAttention-2's softmax: {best}'s mean speed over both passes"))
    checked = [record.content["report"] for record in stored.of("verify")]
    if checked:
        passed = sum(report["ran"] - report["failed"] for report in checked)
        ran = sum(report["ran"] for report in checked)
        found.append(Tile(f"{passed:,} of {ran:,}", "checks against float64 passed"))
    return found


def machines(stored: Stored) -> Section:
    """What every record was measured on and with."""
    rows, versions = [], []
    for record in stored.records:
        environment, changed = record.environment, record.changed()
        state = f"changed since: {', '.join(changed)}" if changed else "as now"
        clocks = "; ".join(environment.get("sm_clock") or []) or None
        rows.append((record.name, record.kind, record.machine, environment["time"][:16].replace("T", " "), environment["driver"],
                     clocks, environment["versions"].get("torch"), environment["git"], state))  # fmt: skip
        versions += [(record.name, name, version) for name, version in environment["versions"].items()]
        versions += [(record.name, f"sources of {name}", digest) for name, digest in environment.get("sources", {}).items()]
    if not rows:
        return Section("Environment", "No record is stored", note("Only files of the tuner were given."))
    columns = ("record", "of", "machine", "time, UTC", "driver", "SM clock, most", "torch", "commit", "kernels' sources")
    stale = sum(row[-1] != "as now" for row in rows)
    heading = "All records are of the kernel sources installed"
    if stale:
        heading = f"{stale} of {len(rows)} records: kernel sources have changed since"
    listed = details("Versions and source hashes", table(("record", "what", "version"), versions))
    return Section("Environment", heading, f"{table(columns, rows)}\n{listed}")
