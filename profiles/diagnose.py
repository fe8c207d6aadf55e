"""A line on each limit of a kernel: how much of it is used, and what that means."""

from __future__ import annotations

from .counters import CONFLICTS, LIMITS, LOADS, OCCUPANCY, STALLS, STORES, WAVEFRONTS

# Percent of a unit's peak: from BOUND on nothing else needs a look; below BUSY the unit is not what holds a kernel up.
BOUND, BUSY = 80.0, 60.0
MANY_CONFLICTS = 0.10  # of all wavefronts


def diagnosis(row: dict) -> list[str]:
    """Lines on a row of reader.compute_rows, one for each limit that was counted, then what was found besides."""
    counters = row["counters"]
    used = {limit: counters[limit.counter] for limit in LIMITS if counters[limit.counter] is not None}
    lines = [f"{limit.counter} {value:.0f} %: {verdict(limit, value)}" for limit, value in used.items()]
    if used and max(used.values()) < BUSY:
        lines.append(f"no unit above {BUSY:.0f} %: bound by latency{waiting(row['stalls'])}")
    elif row["stalls"]:
        lines.append(f"stalls{waiting(row['stalls'])}")
    conflicts, wavefronts = counters[CONFLICTS], counters[WAVEFRONTS]
    if conflicts is not None and wavefronts:
        share = conflicts / wavefronts
        lines.append(
            f"bank conflicts {100 * share:.0f} % of shared memory's wavefronts: {'too many' if share > MANY_CONFLICTS else 'few'}"
        )
    spills = [counters[name] for name in (LOADS, STORES) if counters[name] is not None]
    if spills:
        lines.append(f"spills: {sum(spills):,.0f} instructions" if sum(spills) else "no spills")
    if counters[OCCUPANCY] is not None and counters["occupancy possible"] is not None:
        lines.append(f"occupancy {counters[OCCUPANCY]:.0f} % of {counters['occupancy possible']:.0f} % possible")
    return lines


def verdict(limit, value: float) -> str:
    """What this much use of a unit means."""
    if value >= BOUND:
        return f"bound by {limit.bound_by}"
    return f"{limit.bound_by} may hold it up" if value >= BUSY else "not the limit"


def waiting(stalls: dict[str, float]) -> str:
    """What most warps wait for, with its share of all that wait; empty where that was not counted."""
    if not stalls:
        return ""
    reason, value = next(iter(stalls.items()))
    return f": {100 * value / sum(stalls.values()):.0f} % of waiting warps wait for {STALLS.get(reason, reason)} ({reason})"
