"""What the bindings of csrc's mathematics (csrc/bind_math.cpp) refuse."""

import numpy as np
import pytest
from math_oracle import math


def zeros(*shapes):
    return [np.zeros(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: math.evaluate("cosh", *zeros(4)), "expected one of 'softplus2 library'"),
        (lambda: math.evaluate("1 - beta rcp of 4", *zeros(6)), r"s has shape \(6,\): expected \(4,\)"),
        (lambda: math.run("cubic", "simple", *zeros((2, 8), 2, (2, 8), (2, 8))), "expected 'linear' or 'log'"),
        (
            lambda: math.run("log", "simple", *zeros((2, 9), 2, (2, 9), (2, 9))),
            r"expected shape \[n, R\] with R one of 4, 8, 16, 32",
        ),
        (lambda: math.run("log", "simple", *zeros((2, 8), 3, (2, 8), (2, 8))), r"carry has shape \(3,\): expected \(2,\)"),
        (lambda: math.run("log", "simple", *zeros((2, 8), 2, (2, 8), (2, 4))), r"older has shape \(2, 4\): expected \(2, 8\)"),
        (
            lambda: math.step("log", "simple", "total", *zeros(2, (2, 1))),
            "step 'total': expected 'combine', 'enter', 'advance' or 'undo'",
        ),
        (lambda: math.step("log", "simple", "enter", *zeros(2, 2)), r"y has shape \(2,\): expected \(2, 1\)"),
        (lambda: math.step("linear", "mixed", "combine", *zeros((2, 1), (2, 3))), r"x has shape \(2, 1\): expected \(2, 3\)"),
        (lambda: math.constants("linear", "fast"), "path 'fast': expected 'simple', 'mixed' or 'exact'"),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
