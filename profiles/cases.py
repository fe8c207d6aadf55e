"""What is profiled: cases by name, or any dense shape."""

from __future__ import annotations

from ..problem import Problem
from ..tuning import problems

# name -> (shape as problems.parse takes it, what it stands for); bfloat16 unless asked otherwise.
CASES = {
    "train-1k-128": ("16,16,1024,128", "training, short sequences"),
    "train-4k-128": ("4,16,4096,128", "training"),
    "train-4k-64": ("4,32,4096,64", "training, narrow heads: special functions weigh as much as products"),
    "train-16k-128": ("1,16,16384,128", "training, one long sequence"),
    "train-16k-64": ("1,32,16384,64", "training, one long sequence, narrow heads"),
    "grouped-4k-128": ("2,32/8,4096,128", "four query heads on one of the keys"),
    "prefill-8k-128": ("4,32/8,512/8192,128", "a chunk of queries at the end of many keys"),
    "decode-8k-128": ("16,32/8,1/8192,128", "one query: bound by memory"),
    "launch": ("1,1,64,64", "next to no work: what a launch costs"),
}


def problem(case: str, dtype: str, device: str) -> Problem:
    """The forward problem of a case's name, or of a shape; early stop off, so that every key counts. ValueError for neither."""
    shape = CASES[case][0] if case in CASES else case
    try:
        return problems.parse(shape, dtype, device, skip=False)
    except ValueError as error:
        raise ValueError(f"CASE {case!r}: expected one of {', '.join(CASES)}, or {problems.SHAPE}") from error
