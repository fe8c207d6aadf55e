"""What tuning found: how much of a space lies between its best and its worst config, and whether the defaults hold."""

from __future__ import annotations

import collections
import html

from ..markup import number, table
from ..tuning.replay import Space
from ..tuning.store import Trial
from . import charts
from .page import Section, details, figure, grid, note
from .stored import Stored

NEAR = 1.02  # times the best: as good
ALL_SAME = 1.0


def tuning(stored: Stored) -> Section:
    """Landscapes of fully measured spaces, then what else was tried."""
    parts, drawn, headings = [], {}, []
    for index, (file, spaces) in enumerate(stored.spaces.items()):
        named = dict(zip(names(spaces), spaces, strict=True))
        headings.append(found_in(spaces))
        parts.append(
            note(f"{file}: {len(spaces)} problems whose configs were all measured. Ticks: configs; dots: the best of each.")
        )
        text = "Time of every config over the default's, by problem"
        drawn[f"spread-{index}"] = charts.spread([row for name, space in named.items() for row in ticks(name, space)], text)
        parts.append(figure(f"spread-{index}", "Every config beside the default", text))
        figures = []
        for name, space in largest(named).items():
            axes = widest(space)
            if axes is None:
                continue
            id, title = f"landscape-{index}-{space.problem['exact']['direction']}", f"{name}: time over the best config's"
            drawn[id] = charts.landscape(cells(space, axes), axes, title)
            figures.append(figure(id, title, title))
        parts.append(grid(figures))
    for file, trials in stored.trials.items():
        said, listed = confirmed(trials)
        headings.append(said)
        parts += [f"<h3>{html.escape(said)}</h3>", details(f"All {len(trials)} of {file}", listed)]
    if not headings:
        return Section("Tuning", "No tuning is stored", note("sbk db export FILE stores what sbk tune found."))
    return Section("Tuning", headings[0], "\n".join(parts), drawn)


def found_in(spaces: list[Space]) -> str:
    """How near the defaults come to the best, and how far the worst config is from it."""
    near = sum(1 / space.best <= NEAR for space in spaces)
    worst = max(time / space.best for space in spaces for time in space.times if time is not None)
    held = f"The default config is within 2 % of the best in {near} of {len(spaces)} problems"
    return f"{held}; a bad one takes up to {worst:.0f} times as long"


def names(spaces: list[Space]) -> list[str]:
    """Each space's problem, as short as it is told from the others."""
    dims, backends = ({of(space) for space in spaces} for of in (lambda s: s.problem["exact"]["head_dim"], lambda s: s.backend))
    found, seen = [], collections.Counter()
    for space in spaces:
        exact, N = space.problem["exact"], space.problem["sizes"]["keys"]
        parts = [exact["direction"].capitalize(), f"N = {N}"]
        parts += [f"D = {exact['head_dim']}"] if len(dims) > 1 else []
        parts += [space.backend] if len(backends) > 1 else []
        name = ", ".join(parts)
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def text_of(config: dict) -> str:
    """A config on one line."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def ticks(name: str, space: Space) -> list[dict]:
    """The configs of a space that ran."""
    ran = [(time, config) for time, config in zip(space.times, space.configs, strict=True) if time is not None]
    return [
        {"problem": name, "ratio": round(time, 4), "config": text_of(config), "best": time == space.best} for time, config in ran
    ]


def largest(named: dict[str, Space]) -> dict[str, Space]:
    """Of each direction the problem with the most keys."""
    by_size = sorted(named.items(), key=lambda item: item[1].problem["sizes"]["keys"])
    return dict({space.problem["exact"]["direction"]: (name, space) for name, space in by_size}.values())


def widest(space: Space) -> tuple[str, str] | None:
    """The two parameters with the most values; None where fewer vary."""
    counts = {name: len({config[name] for config in space.configs}) for name in space.configs[0]}
    varied = sorted((name for name, count in counts.items() if count > 1), key=lambda name: -counts[name])
    return tuple(sorted(varied[:2], reverse=True)) if len(varied) > 1 else None


def cells(space: Space, axes: tuple[str, str]) -> list[dict]:
    """The least time for each pair of values of two parameters, over the best of all."""
    best = {}
    for time, config in zip(space.times, space.configs, strict=True):
        if time is not None:
            pair = tuple(config[name] for name in axes)
            best[pair] = min(best.get(pair, time), time)
    return [{"x": x, "y": y, "ratio": round(time / space.best, 4)} for (x, y), time in sorted(best.items())]


def confirmed(trials: list[Trial]) -> tuple[str, str]:
    """(what was found, the table) of trials that were kept without the others of their spaces."""
    kept = [trial for trial in trials if trial.status == "confirmed"]
    gains = [gain for trial in kept if (gain := gain_of(trial)) is not None]
    better = sum(gain > ALL_SAME for gain in gains)
    machines = ", ".join(dict.fromkeys(trial.bodies["machine"]["name"] for trial in kept))
    said = f"the default won each of {len(kept)} searches" if not better else f"{better} of {len(kept)} searches beat the default"
    rows = []
    for trial in sorted(kept, key=order):
        exact, sizes = (trial.bodies["problem"][name] for name in ("exact", "sizes"))
        rows.append((
            trial.bodies["kernel"]["backend"], exact["direction"], exact["head_dim"], sizes["keys"], sizes["heads"],
            trial.details.get("space"), number(trial.median, ".3f"), number(gain_of(trial), ".3f"), text_of(trial.bodies["config"]),
        ))  # fmt: skip
    numbers = ("D", "N", "B H", "configs tried", "ms", "gain over the default")
    return f"On {machines} {said}", table(("backend", "pass", *numbers, "config"), rows, numbers)


def gain_of(trial: Trial) -> float | None:
    """The default's time over a config's."""
    default = trial.details.get("default_ms")
    return default / trial.median if default and trial.median else None


def order(trial: Trial) -> tuple:
    """Where a trial stands in the table."""
    exact, sizes = (trial.bodies["problem"][name] for name in ("exact", "sizes"))
    return trial.bodies["kernel"]["backend"], exact["direction"], exact["head_dim"], sizes["keys"]
