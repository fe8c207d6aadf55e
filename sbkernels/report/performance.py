"""How fast it is: times over N, times under the machine's ceilings, what a profiler counted."""

from __future__ import annotations

import collections
import html

from ..markup import number, table
from ..profiles.counters import COUNTERS
from . import charts, points
from .page import Section, details, figure, grid, note
from .points import Point
from .stored import Stored

PASSES = ("forward", "backward")
SOFTMAX = ("FlashAttention-2", "cuDNN", "SDPA math")
MIB = 2**20
FEWEST_KEYS = 128  # under the ceilings: with fewer, launching is what takes the time
FAST = 10.0  # TFLOP/s: machines that never reach it need more digits
TITLES = {"forward": "Forward", "backward": "Backward", points.DECODE: "One query"}
COUNTED = (
    "TFLOP/s of the matrix products on the causal half, five of them backward; GB/s with each tensor moved once. "
    "Without colour: softmax attention of torch's SDPA on the same tensors. Higher is faster."
)


def speed(stored: Stored, found: dict[str, list[Point]]) -> Section:
    """Rates over N of each pass, every time in a table, and what has none."""
    if not found:
        return Section("Speed", "No times are stored", note("sbk bench --json FILE or sbk compare --json FILE stores some."))
    parts, drawn, headings = [], {}, []
    for index, (machine, mine) in enumerate(found.items()):
        looks = looks_of(mine)
        panels = {(way, D): curve for way in TITLES for D, curve in points.curves(mine, way).items()}
        figures = []
        for (way, D), curve in panels.items():
            id, title = f"speed-{index}-{way}-{D}", f"{TITLES[way]}, D = {D}"
            top = max(p.rate() for key, other in panels.items() if key[0] == way for p in other)
            text = f"{charts.unit(curve[0])} over N on {machine}: {title}"
            drawn[id] = charts.speed(curve, looks, top, text)
            figures.append(figure(id, title, text))
        if panels:
            kept = [p for (way, _), curve in panels.items() for p in curve if way != points.DECODE]
            kept = kept or [p for curve in panels.values() for p in curve]
            heading, passes = finding(kept)
            parts += [f"<h3>{html.escape(f'{machine}: {heading}')}</h3>"] if headings else []  # the first heads the section
            headings.append(heading)
            (shape, *_) = kept
            parts.append(f"<p>{html.escape(passes)}</p>")
            parts.append(note(f"{machine}, {shape.dtype}, causal, early stop off, B H N D constant over N. {COUNTED}"))
            parts.append(grid(figures))
        parts.append(details(f"All {len(mine)} times on {machine}", times(mine)))
    missing = points.left_out(stored)
    if missing:
        listed = table(("record", "problem", "contender", "pass", "why"), missing)
        parts.append(details(f"{len(missing)} without a time, and why", listed))
    untold = f"{sum(map(len, found.values()))} times, none of them over N"
    return Section("Speed", headings[0] if headings else untold, "\n".join(parts), drawn)


def looks_of(found: list[Point]) -> dict[str, charts.Style]:
    """How each contender of a machine is drawn."""
    return charts.styles({p.contender for p in found if p.ours}, {p.contender for p in found if not p.ours})


def finding(found: list[Point]) -> tuple[str, str]:
    """(how our fastest contender compares with softmax, the same for each pass)."""
    best = points.fastest(found)
    if best is None:
        return "Only others were timed", ""
    top = max(p.tflops for p in found if p.contender == best)
    ratios = {other: {way: points.span(found, best, other, way) for way in TITLES} for other in SOFTMAX}
    both = {other: [bound for span in spans.values() if span for bound in span] for other, spans in ratios.items()}
    beside = [f"{between(min(bounds), max(bounds))} times {other}'s speed" for other, bounds in both.items() if bounds]
    heading = f"{best} is the fastest backend, {' and '.join(beside)}" if beside else f"{best} is the fastest backend"
    each = [
        f"{way} {between(*span)} times {other}'s"
        for other, spans in ratios.items() for way, span in spans.items() if span
    ]  # fmt: skip
    return heading, f"{best} reaches up to {top:.3g} TFLOP/s. Its speed: {', '.join(each)}." if each else ""


def between(low: float, high: float) -> str:
    """A range in words, one number where both ends look the same."""
    return " to ".join(dict.fromkeys((f"{low:.2f}", f"{high:.2f}")))


def times(found: list[Point]) -> str:
    """Every point as a table; columns that nobody fills are left out."""
    others = [name for name in SOFTMAX if any(name in p.ratios for p in found)]
    rows, form = [], ".1f" if max(p.tflops or 0 for p in found) >= FAST else ".4f"
    for p in found:
        low, high = p.interval or (None, None)
        rows.append({
            "problem": p.problem, "pass": p.direction, "contender": p.contender, "ms": number(p.ms, ".3f"),
            "95 % interval": p.interval and f"{low:.3f} to {high:.3f}", "TFLOP/s": number(p.tflops, form),
            "% of the limit": p.share and f"{100 * p.share:.0f}", "limit": p.limit or None,
            **{f"x {name}": number(p.ratios.get(name), ".2f") for name in others},
            "peak MiB": p.peak_bytes and f"{p.peak_bytes / MIB:,.0f}",
        })  # fmt: skip
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    words = ("problem", "pass", "contender", "limit")
    about = note("x NAME: that one's time over this one's, above 1 this one is faster.") if others else ""
    numbers = tuple(name for name in columns if name not in words)
    return table(columns, ([row[name] for name in columns] for row in rows), numbers) + about


def roofline(stored: Stored, found: dict[str, list[Point]]) -> Section:
    """Points under the ceilings that were measured on the same machine."""
    limits = {record.machine: record.content["limits"] for record in stored.of("bench") if record.content.get("limits")}
    parts, drawn, heading = [], {}, ""
    for index, machine in enumerate(filter(limits.get, found)):  # in the order of their speed's sections
        ceilings = limits[machine]
        fit = [p for p in found[machine] if p.sizes and p.tflops and not p.packed and p.N >= FEWEST_KEYS]
        panels = collections.defaultdict(list)
        for p in fit:
            if p.direction in TITLES and (p.ours or p.contender in SOFTMAX):  # what others move is not what a fused kernel moves
                panels[p.direction, p.D].append(p)
        looks, figures = looks_of(found[machine]), []
        for (way, D), kept in panels.items():
            id, title = f"roofline-{index}-{way}-{D}", f"{TITLES[way]}, D = {D}"
            text = f"TFLOP/s over operations a byte under the ceilings of {machine}: {title}"
            drawn[id] = charts.roofline(kept, looks, ceilings, text)
            figures.append(figure(id, title, text))
        parts.append(note(f"Ceilings measured on {machine}: {measured(ceilings)}. Operations a byte: each tensor moved once."))
        parts.append(grid(figures))
        heading = heading or attained(fit)
    if not drawn:
        heading = "Where the limits lie is not stored yet"
        parts = [note("No record of sbk bench is among the files: it measures the ceilings of tensor cores, special functions and "
                      "memory on the same machine. sbk bench --json FILE stores one.")]  # fmt: skip
    return Section("Roofline", heading, "\n".join(parts), drawn)


def measured(ceilings: dict) -> str:
    """What a machine can do, in words."""
    said = [f"{ceilings['tensor_tflops']:.3g} TFLOP/s of matrix products", f"{ceilings['memory_gbs']:,.0f} GB/s"]
    if ceilings["special_function_gops"]:
        (low, high), (low_back, high_back) = (charts.SPECIAL_FUNCTIONS[way] for way in PASSES)
        said.append(f"{ceilings['special_function_gops']:,.0f} · 10⁹ special functions a second")
        said.append(f"of which a logit takes {low:g} to {high:g}, backward {low_back:g} to {high_back:g} (the band)")
    return ", ".join(said)


def attained(found: list[Point]) -> str:
    """How near the fastest of ours comes to its limit."""
    ours = [p for p in found if p.ours and p.share]
    if not ours:
        return "Times under the ceilings of the machine"
    best = max(ours, key=lambda p: p.share)
    share = f"{100 * best.share:.0f} % of what the {best.limit} limit allows"
    return f"{best.contender} reaches {share}, {best.direction} on {best.problem}"


def profiles(stored: Stored) -> Section | None:
    """What Nsight Compute counted, and what it means; None where nothing was profiled."""
    parts, bound = [], []
    for record in stored.of("profile"):
        if record.content["tool"] != "ncu":
            continue
        names = [f"{index} {row['kernel']}" for index, row in enumerate(record.rows, 1)]
        counted = [(c.name, c.unit, *(number(row["counters"].get(c.name), c.form) for row in record.rows)) for c in COUNTERS]
        parts.append(f"<h3>{html.escape(record.content.get('problem', record.content['report']))}</h3>")
        parts.append(table(("counter", "unit", *names), counted, tuple(names)))
        for name, row in zip(names, record.rows, strict=True):
            parts.append(f"<p><b>{html.escape(name)}</b><br>{'<br>'.join(map(html.escape, row['diagnosis']))}</p>")
            bound += [f"{row['kernel']}: {line}" for line in row["diagnosis"] if "bound by" in line]
    if not parts:
        return None
    return Section("Profiles", bound[0] if bound else "No unit of the GPU is full", "\n".join(parts))
