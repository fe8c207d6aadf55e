"""Charts as Vega-Lite specifications, their data inside. Colours are the page's CSS variables: a chart follows its theme."""

from __future__ import annotations

import dataclasses
import itertools
import math

from ..bench import limits
from . import points as timed
from .points import Point

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name, never fetched
FONT = "system-ui, sans-serif"
HEIGHT = 250  # pixels
LABEL_HEIGHT = 14  # pixels between labels at the ends of lines
MARGIN = 1.04  # of a logarithmic axis beyond its values
ROOM, SLOPE = 1.8, 16  # of a roofline: factor around what is drawn; how far below the ridge the slope of memory is shown
NOTHING = {"values": [{}]}  # one row, for a mark that has no data
HEADROOM = 1.06  # of the largest value, over which an axis ends
# Special functions a logit, least and most: of the reciprocal that a group of keys has in common a key's share is at most half.
SPECIAL_FUNCTIONS = {way: (least, least + 0.5) for way, least in limits.SPECIAL.items()}


@dataclasses.dataclass(frozen=True)
class Style:
    """How a contender is drawn: told apart by colour, by shape and by dashes, each alone."""

    color: str
    shape: str
    dash: tuple[int, int] = (1, 0)


# Ours have colours, what they are compared with is grey. A variant is drawn as its backend is, dashed.
OURS = {"cuda": Style("blue", "circle"), "triton": Style("orange", "square"), "ptx": Style("green", "triangle-up"),
        "torch": Style("purple", "diamond")}  # fmt: skip
OTHERS = {"FlashAttention-2": Style("ink", "cross", (6, 3)), "cuDNN": Style("muted", "triangle-down", (2, 2))}
MORE_OURS = (Style("pink", "circle"), Style("gold", "square"))
MORE_OTHERS = tuple(Style("muted", shape, (1, 3)) for shape in ("diamond", "stroke", "square", "circle"))
VARIANTS = ((5, 3), (2, 2), (8, 2))


def styles(ours: set[str], others: set[str] = frozenset()) -> dict[str, Style]:
    """A style for each contender, the same for the same contenders."""
    more_ours, more_others, dashes = (itertools.cycle(kind) for kind in (MORE_OURS, MORE_OTHERS, VARIANTS))
    chosen = {}
    for name in sorted(ours):
        backend, _, variant = name.partition(" ")
        style = OURS.get(backend) or chosen.get(backend) or next(more_ours)
        chosen[name] = dataclasses.replace(style, dash=next(dashes)) if variant else style
    return chosen | {name: OTHERS.get(name) or next(more_others) for name in sorted(others)}


def variable(color: str) -> str:
    """A colour of the page."""
    return f"var(--{color})"


def chart(description: str, layers: list[dict], height: int = HEIGHT, **more) -> dict:
    """A chart as wide as its place. description: for who cannot see it."""
    lines = {"domainColor": variable("line"), "tickColor": variable("line"), "gridColor": variable("grid")}
    titles = {"titleColor": variable("muted"), "titleFontWeight": "normal", "titleFontSize": 11, "titleFont": FONT}
    labels = {"labelColor": variable("muted"), "labelFontSize": 11, "labelFont": FONT}
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": 2,
        "layer": layers,
        "config": {"background": "transparent", "font": FONT, "view": {"stroke": None}, "axis": lines | titles | labels},
    } | more


def vertical(field: str, title: str, **more) -> dict:
    """A y axis with its title above it, where it takes no width."""
    axis = {"title": title, "titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": -28, "titleY": -14}
    return {"field": field, "type": "quantitative", "axis": axis | more.pop("axis", {})} | more


def lengths_axis(found: list[Point]) -> dict:
    """An x axis over N, a tick for each, in powers of two."""
    lengths = sorted({p.N for p in found})
    label = f"datum.value >= {timed.KIB} ? format(datum.value / {timed.KIB}, '~r') + 'k' : format(datum.value, 'd')"
    axis = {"title": "keys N", "values": lengths, "labelExpr": label, "grid": False, "labelOverlap": True, "labelFlush": False}
    scale = {"type": "log", "base": 2, "domain": [lengths[0], lengths[-1]], "nice": False}
    return {"field": "x", "type": "quantitative", "scale": scale, "axis": axis}


def share_of(value: float, low: float, high: float, log: bool) -> float:
    """Where a value stands on an axis from low, 0, to high, 1."""
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def dodged(wanted: dict[str, float], low: float, high: float, log: bool = False) -> dict[str, float]:
    """Values at which labels stand without touching each other, as near to those wanted as they can, between low and high."""
    step = LABEL_HEIGHT / HEIGHT
    places, last = {}, -math.inf
    for name in sorted(wanted, key=wanted.get):
        last = max(share_of(wanted[name], low, high, log), last + step)
        places[name] = last
    ceiling = 1 + step / 2
    for name in reversed(places):
        places[name] = min(places[name], ceiling)
        ceiling = places[name] - step
    return {name: low * (high / low) ** share if log else low + (high - low) * share for name, share in places.items()}


def described(p: Point) -> dict:
    """What a point says when it is touched."""
    shown = {"contender": p.contender, "problem": p.problem, "pass": p.direction, "ms": f"{p.ms:.4g}"}
    if p.tflops:
        shown[unit(p)] = f"{p.rate():.4g}"
    if p.share:
        shown["of the limit"] = f"{100 * p.share:.0f} % ({p.limit})"
    return shown | {f"beside {name}": f"{ratio:.2f} x" for name, ratio in p.ratios.items()}


def curve_layers(
    found: list[Point], looks: dict[str, Style], x, y, x_axis: dict, y_axis: dict, low: float, high: float, log: bool
) -> list:
    """Lines with points, and each line's name at its end. x, y: of a point."""
    names = [name for name in looks if any(p.contender == name for p in found)]
    used = [looks[name] for name in names]
    values = [{"x": x(p), "y": y(p), "contender": p.contender} | described(p) for p in found]
    shown = list(dict.fromkeys(key for value in values for key in value if key not in ("x", "y")))
    by = {"field": "contender", "type": "nominal", "legend": None}
    color = by | {"scale": {"domain": names, "range": [variable(style.color) for style in used]}}
    dash = by | {"scale": {"domain": names, "range": [style.dash for style in used]}}
    shape = by | {"scale": {"domain": names, "range": [style.shape for style in used]}}
    ends = {name: y(max((p for p in found if p.contender == name), key=x)) for name in names}
    labels = [{"contender": name, "y": place} for name, place in dodged(ends, low, high, log).items()]
    position = {"x": x_axis, "y": y_axis}
    return [
        {"data": {"values": values}, "mark": {"type": "line", "strokeWidth": 2},
         "encoding": position | {"color": color, "strokeDash": dash, "order": {"field": "x"}}},
        {"data": {"values": values}, "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
         "encoding": position | {"color": color, "shape": shape,
                                 "tooltip": [{"field": name, "type": "nominal"} for name in shown]}},
        {"data": {"values": labels}, "mark": {"type": "text", "align": "left", "dx": 9, "fontSize": 11, "font": FONT},
         "encoding": {"x": {"value": "width"}, "y": {"field": "y", "type": "quantitative"},
                      "text": {"field": "contender"}, "color": color}},
    ]  # fmt: skip


def unit(p: Point) -> str:
    """What its rate counts."""
    return "GB/s" if p.direction == timed.DECODE else "TFLOP/s"


def speed(found: list[Point], looks: dict[str, Style], top: float, description: str) -> dict:
    """Rates over N, a line for each contender; top: the largest value of all charts that stand side by side."""
    high = top * HEADROOM
    y_axis = vertical("y", unit(found[0]), scale={"domain": [0, high], "nice": False}, axis={"tickCount": 5})
    layers = curve_layers(found, looks, lambda p: p.N, Point.rate, lengths_axis(found), y_axis, 0, high, False)
    return chart(description, layers)


def roofline(found: list[Point], looks: dict[str, Style], limits: dict, description: str) -> dict:
    """TFLOP/s over operations a byte, points of one pass and D, under the ceilings of memory, products and special functions."""
    tensor, gops, bandwidth = (limits[name] for name in ("tensor_tflops", "special_function_gops", "memory_gbs"))
    counts = SPECIAL_FUNCTIONS[found[0].direction] if gops else ()  # not measured everywhere
    special = [found[0].flops_a_logit() * gops / count / 1e3 for count in reversed(counts)]
    ridge = tensor * 1e3 / bandwidth
    reached = [p.intensity() for p in found]
    low_x, high_x = min(*reached, ridge / SLOPE) / ROOM, max(*reached, ridge) * ROOM
    low, high = min(p.tflops for p in found) / ROOM, max([tensor, *special]) * ROOM
    x_axis = {"field": "x", "type": "quantitative", "scale": {"type": "log", "domain": [low_x, high_x], "nice": False},
              "axis": {"title": "operations a byte of memory traffic", "grid": False} | decades(low_x, high_x)}  # fmt: skip
    y_axis = vertical("y", "TFLOP/s", scale={"type": "log", "domain": [low, high], "nice": False}, axis=decades(low, high))
    start = max(low_x, low * 1e3 / bandwidth)
    roof = [{"x": x, "y": min(tensor, x * bandwidth / 1e3)} for x in (start, ridge, high_x)]
    middle = math.sqrt(start * ridge)
    names = [
        {"text": "matrix products", "x": high_x, "y": tensor, "align": "right", "dx": -4, "dy": -7},
        {"text": "memory", "x": middle, "y": middle * bandwidth / 1e3, "align": "right", "dx": -6, "dy": -6},
    ]
    if special:
        middle = math.sqrt(special[0] * special[1])
        names.append({"text": "special functions", "x": low_x, "y": middle, "align": "left", "dx": 6, "dy": 0})
    place = {"x": x_axis, "y": y_axis}
    band = [{"x": low_x, "x2": high_x, "y": special[0], "y2": special[1]}] if special else []
    label = {"type": "text", "color": variable("muted"), "fontSize": 11, "baseline": "middle"}
    ceilings = [
        {"data": {"values": band}, "mark": {"type": "rect", "color": variable("band")},
         "encoding": place | {"x2": {"field": "x2"}, "y2": {"field": "y2"}}},
        {"data": {"values": roof}, "mark": {"type": "line", "color": variable("ink"), "strokeWidth": 1.5}, "encoding": place},
        *({"data": {"values": [name]}, "encoding": place | {"text": {"field": "text"}},
           "mark": label | {key: name[key] for key in ("align", "dx", "dy")}} for name in names),
    ]  # fmt: skip
    # No lines: sizes that differ in more than N would be strung together.
    _, *marks = curve_layers(found, looks, Point.intensity, lambda p: p.tflops, x_axis, y_axis, low, high, True)
    return chart(description, ceilings + marks)


def decades(low: float, high: float) -> dict:
    """An axis' ticks at powers of ten."""
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return {"values": [10.0**exponent for exponent in exponents], "format": "~g"}


def errors(rows: list[dict], looks: dict[str, Style], allowed: float, top: float, description: str) -> dict:
    """A dot for each result: its error over the baseline's. rows: backend, problem, ratio; top: where the axis ends."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    y_axis = {"field": "backend", "type": "nominal", "sort": names,
              "axis": {"title": None, "labelLimit": 130, "ticks": False, "domain": False, "grid": True}}  # fmt: skip
    x_axis = {"field": "ratio", "type": "quantitative", "scale": {"domain": [0, top], "nice": False},
              "axis": {"title": "error over the baseline's", "tickCount": 4, "grid": False}}  # fmt: skip
    color = {"field": "backend", "type": "nominal", "legend": None,
             "scale": {"domain": names, "range": [variable(looks[name].color) for name in names]}}  # fmt: skip
    touched = [{"field": name, "type": "nominal"} for name in ("backend", "problem")] + [{"field": "ratio", "format": ".2f"}]
    limit, red = {"x": {"datum": allowed, "type": "quantitative"}}, {"color": variable("bad")}
    layers = [
        {"data": NOTHING, "encoding": limit,
         "mark": {"type": "rule", "strokeDash": [4, 3], "strokeWidth": 1.5} | red},
        {"data": NOTHING, "encoding": limit | {"y": {"value": 0}, "text": {"value": f"allowed: {allowed:g}"}},
         "mark": {"type": "text", "align": "right", "baseline": "bottom", "dx": 4, "dy": -4, "fontSize": 11} | red},
        {"data": {"values": rows}, "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.55},
         "encoding": {"x": x_axis, "y": y_axis, "color": color, "tooltip": touched}},
    ]  # fmt: skip
    return chart(description, layers, height=28 * len(names))


def spread(rows: list[dict], description: str) -> dict:
    """A tick for each config: its time over the default's, the best marked. rows: problem, ratio, config, best."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    y_axis = {"field": "problem", "type": "nominal", "sort": names,
              "axis": {"title": None, "labelLimit": 150, "ticks": False, "domain": False}}  # fmt: skip
    low, high = (f(row["ratio"] for row in rows) for f in (min, max))
    domain = [low / MARGIN, high * MARGIN]
    halves = range(math.floor(2 * math.log2(domain[0])), math.ceil(2 * math.log2(domain[1])) + 1)
    steps = [step for half in halves if domain[0] <= (step := 2 ** (half / 2)) <= domain[1]]
    x_axis = {"field": "ratio", "type": "quantitative", "scale": {"type": "log", "domain": domain, "nice": False},
              "axis": {"title": "time over the default config's", "grid": False, "values": steps, "format": ".2~f"}}  # fmt: skip
    touched = [{"field": "config", "type": "nominal"}, {"field": "ratio", "format": ".3f", "title": "time over the default's"}]
    place, default = {"x": x_axis, "y": y_axis, "tooltip": touched}, {"x": {"datum": 1, "type": "quantitative"}}
    layers = [
        {"data": NOTHING, "mark": {"type": "rule", "color": variable("ink")}, "encoding": default},
        {"data": NOTHING, "mark": {"type": "text", "baseline": "bottom", "dy": -4, "color": variable("ink"), "fontSize": 11},
         "encoding": default | {"y": {"value": 0}, "text": {"value": "default"}}},
        {"data": {"values": rows}, "mark": {"type": "tick", "color": variable("muted"), "thickness": 1.5, "opacity": 0.7},
         "encoding": place},
        {"data": {"values": [row for row in rows if row["best"]]},
         "mark": {"type": "point", "filled": True, "color": variable("blue"), "size": 80, "opacity": 1}, "encoding": place},
    ]  # fmt: skip
    return chart(description, layers, height=24 * len(names))


def landscape(cells: list[dict], names: tuple[str, str], description: str) -> dict:
    """The least time of all configs with two values, over the best: a cell for each pair. cells: x, y, ratio."""
    axis = {"labelAngle": 0, "ticks": False, "domain": False, "grid": False}
    top = max(cell["ratio"] for cell in cells)
    x_axis, y_axis = (
        {"field": field, "type": "ordinal", "axis": axis | {"title": name}} for field, name in zip("xy", names, strict=True)
    )
    y_axis["axis"] |= {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "start", "titleX": -28, "titleY": -14}
    y_axis["sort"] = "descending"
    # One scheme for both themes: its cells carry their own ink.
    scale = {"type": "log", "scheme": "viridis", "reverse": True, "domain": [1, max(top, 2.0)]}
    color = {"field": "ratio", "type": "quantitative", "scale": scale, "legend": None}
    dark = f"datum.ratio > {math.sqrt(max(top, 2.0))}"
    layers = [
        {"mark": {"type": "rect", "stroke": variable("paper"), "strokeWidth": 2}, "encoding": {"color": color}},
        {"mark": {"type": "text", "fontSize": 11}, "encoding": {
            "text": {"field": "ratio", "type": "quantitative", "format": ".2f"},
            "color": {"condition": {"test": dark, "value": "white"}, "value": "black"}}},
    ]  # fmt: skip
    return chart(description, layers, height=34 * len({cell["y"] for cell in cells}), data={"values": cells},
                 encoding={"x": x_axis, "y": y_axis})  # fmt: skip
