"""Large problems, held against float64 in places: small problems within them, whose results do not depend on the rest."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

from . import inputs, tolerance

SPOT = 64  # query rows that are checked at one place
WHOLE_LOGITS = 2**24  # of a head: up to here all rows and keys are checked, in two places
KINDS = ("reference", "baseline", "floor")  # of tolerance.Expected


class Spot(NamedTuple):
    """A small problem within a large one: where its rows and keys lie, how many of its newest keys it decides, what is expected."""

    rows: tuple[slice, slice, slice]
    keys: tuple[slice, slice, slice]
    newest: int
    expected: tolerance.Expected


def spots(x: inputs.Inputs) -> list[Spot]:
    """Places of a problem: rows at the end and in the middle, in the first and the last group of heads.

    Rows of out, remainder and dq follow from their own queries and all older keys, dk and dv of the newest keys from the newest
    queries. Of small problems the rows at the end are all there are.
    """
    group, (first, last) = x.q.shape[1] // x.k.shape[1], spans(x)
    found = []
    for b, kv_head, (start, end) in sorted({(0, 0, first), (x.q.shape[0] - 1, x.k.shape[1] - 1, last)}):
        heads, kv_heads = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
        M, offset = (x.q.shape[2], 0) if x.cu_seqlens is None else (end - start, start)
        size = M if M * (end - start) <= WHOLE_LOGITS else SPOT
        for last_row in {M, max(1, M // 2)} if size < M else {M}:
            first_row = max(0, last_row - size)
            rows = (slice(b, b + 1), heads, slice(offset + first_row, offset + last_row))
            keys = (slice(b, b + 1), kv_heads, slice(start, end - M + last_row))
            tensors = (x.q[rows], x.k[keys], x.v[keys], x.dout[rows], x.dremainder[rows])
            expected = tolerance.expect(*tensors, **x.case.options)
            # With fewer queries than keys the oldest keys are decided by the first row on, too.
            newest = 0 if last_row < M else end - start if first_row == 0 else size
            found.append(Spot(rows, keys, newest, expected))
    return found


def judge_spots(found: list[Spot], got) -> list[tolerance.Finding]:
    """Findings of out, remainder, dq, dk and dv of the whole problem at all spots."""
    out, remainder, dq, dk, dv = got
    findings = []
    for spot in found:
        for name, tensor in (("out", out), ("remainder", remainder), ("dq", dq)):
            findings.append(tolerance.compare(tensor[spot.rows], spot.expected, name))
        if spot.newest:
            part = {kind: {name: t[:, :, -spot.newest :] for name, t in getattr(spot.expected, kind).items()} for kind in KINDS}
            expected = dataclasses.replace(spot.expected, **part)
            for name, tensor in (("dk", dk), ("dv", dv)):
                findings.append(tolerance.compare(tensor[spot.keys][:, :, -spot.newest :], expected, name))
    return findings


def spans(x: inputs.Inputs) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, last key) of the first and of the last sequence that has any."""
    bounds = [0, x.k.shape[2]] if x.cu_seqlens is None else x.cu_seqlens.tolist()
    filled = [(begin, end) for begin, end in itertools.pairwise(bounds) if end > begin]
    return filled[0], filled[-1]
