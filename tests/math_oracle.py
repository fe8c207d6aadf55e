"""What csrc/math.cuh should give, in float64, and how far roundings may take its runs of keys from it.

Bounds count roundings: U is the most that one rounding to float32 changes a number, relatively; a function of the mathematical
library is right to one unit of the last place, at most 2 U. Results or factors below 2^-126 are flushed, an absolute TINY.
"""

import numpy as np
import pytest

math = pytest.importorskip("sbkernels._C", reason="the extension sbkernels._C is not built").math

from sbkernels.bench import softplus  # noqa: E402

U, TINY, LN_2 = 2.0**-24, 2.0**-126, np.log(2)
STICKS = (1.0, 0.5, 2.0**-20, 2.0**-61)
ROWS = 2000
RUNS = (4, 8, 16, 32)
GROUP = {4: 4, 8: 8, 16: 8, 32: 8}  # keys of a run that share a reciprocal
# What LinearRun's two paths choose from: MIXED takes the one or the other, EXACT is MIXED with no row taken for simple. LogRun's
# paths are one.
SIMPLE, MIXED, EXACT, LOG = ("linear", "simple"), ("linear", "mixed"), ("linear", "exact"), ("log", "mixed")
PATHS = (SIMPLE, EXACT, LOG)
of_paths = pytest.mark.parametrize("path", PATHS, ids="-".join)
of_paths_for_all = pytest.mark.parametrize("path", PATHS[1:], ids="-".join)
EXCESS, REST, IS_SIMPLE = range(3)  # columns of a total of MIXED and EXACT


def wide(x):
    return np.asarray(x, dtype=np.float64)


def softplus2(s):
    return np.logaddexp2(0.0, wide(s))


def one_minus_beta(s):
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp2(wide(s)))


def logits(R, rows=ROWS):
    """{regime: base-2 logits [rows, R]}."""
    rng = np.random.default_rng(R)
    shape = (rows, R)
    made = {
        "normal": rng.normal(0, 1, shape),
        "stick survives": rng.normal(-8, 1.5, shape),
        "small shares": rng.uniform(-34, -24, shape),
        "around SIMPLE_LIMIT": rng.choice([62.0, -30.0], shape, p=(1 / R, 1 - 1 / R)) + rng.normal(0, 0.01, shape),
        "large": rng.normal(0, 30, shape),
        "saturated": rng.choice([-150.0, 0.0, 150.0], shape),
        "all saturated": np.full(shape, 150.0),
        "around the cut": rng.uniform(60, 66, shape),
        "around a flush": rng.uniform(-130, -120, shape),
        "enormous": rng.choice([-1e30, -1e5, 0.0, 1e5, 1e30], shape),
        "infinite": rng.choice([-np.inf, 0.0, np.inf], shape),
    }
    return {name: s.astype(np.float32) for name, s in made.items()}


def all_exponents():
    """{regime: base-2 logits [n, 4]} of both signs, all exponents, a dense grid: alone, with an ordinary key, with neighbours."""
    s = softplus.samples()[::7]
    s = s[~np.isnan(s)]
    s = s[: len(s) // 4 * 4]
    places, rows = np.arange(len(s)) % 4, np.arange(len(s))
    alone = np.full((len(s), 4), math.INVISIBLE, dtype=np.float32)
    alone[rows, places] = s
    beside = alone.copy()
    beside[rows, 3 - places] = -1.0
    return {"alone": alone, "beside": beside, "neighbours": s.reshape(-1, 4)}


def cases():
    regimes = [(name, R) for R in RUNS for name in logits(R, 1)] + [(name, None) for name in ("alone", "beside", "neighbours")]
    return [pytest.param(name, R, id=f"{name}-{R or 'all exponents'}") for name, R in regimes]


def case(name, R):
    return logits(R)[name] if R else all_exponents()[name]


def carries(formulation, rows):
    """Sticks [rows] as carries."""
    sticks = np.resize(np.array(STICKS), rows)
    return sticks, (sticks if formulation == "linear" else -np.log2(sticks)).astype(np.float32)


def sticks_of(formulation, carry):
    return wide(carry) if formulation == "linear" else np.exp2(-wide(carry))


def run(path, s, carry, a=None, older=None):
    """math.run; without a and older, the gradient is 1 - beta."""
    a = np.ones_like(s) if a is None else a
    older = np.zeros_like(s) if older is None else older
    return math.run(*path, s, carry, a, older)


def run_where_taken(path, s, sticks, carry, *more):
    """(s, sticks, answers) of the rows that the kernels would take this path with: SIMPLE where simple()."""
    got = run(path, s, carry, *more)
    if path != SIMPLE:
        return s, sticks, got
    return s[got["simple"]], sticks[got["simple"]], {name: x[got["simple"]] for name, x in got.items()}


def number(path, total):
    """The column of totals that the path goes by."""
    return total[:, REST if path == EXACT else 0]


def identity(path, rows):
    return np.tile(math.constants(*path)["IDENTITY"], (rows, 1))


def excess_of(s):
    """Product of u, less 1, with all digits."""
    with np.errstate(over="ignore"):
        return np.expm1(LN_2 * softplus2(s).sum(1))


def expected(path, s, sticks):
    """Weights of eq. (3), what is left, and the total; in float64 and log space, of logits cut at MAX_LOGIT2."""
    s = np.minimum(wide(s), math.MAX_LOGIT2)
    spent = np.cumsum(softplus2(s)[:, ::-1], 1)[:, ::-1]  # from this key to the newest
    weights, left = sticks[:, None] * np.exp2(s - spent), sticks * np.exp2(-spent[:, 0])
    if path == SIMPLE:
        total = np.minimum(excess_of(s), math.MAX_EXCESS)
        return weights, sticks / (1 + total), total
    return weights, left, np.exp2(-spent[:, 0]) if path == EXACT else spent[:, 0]


def bounds(path, s, sticks):
    """Largest absolute errors of what `expected` returns."""
    weights, left, total = expected(path, s, sticks)
    s = np.minimum(wide(s), math.MAX_LOGIT2)
    R = s.shape[1]
    if path == SIMPLE:
        # Excess: ex2 2 U and two sums a key; a flushed key takes TINY times the other u. Left: 1 + excess, the reciprocal and the
        # product besides. Weights: oldest key first, 2^s 2 U, the product and the sum a key. A subnormal stick is right to 2^-150,
        # as is each weight in it, which all grow with the keys.
        u = 1 + excess_of(s)
        subnormal = ((R + 1) * 2.0**-150 * u)[:, None]
        return (8 * R + 6) * U * weights + subnormal + TINY, (4 * R + 3) * U * left + 2.0**-150, 4 * R * U * total + R * TINY * u
    if path == EXACT:
        # A key: ex2 2 U, u U, the reciprocal and the product U each. A subnormal product, or stick, is right to 2^-150. Weights:
        # the stick, 2^s 2 U and its product.
        subnormal = (R + 1) * 2.0**-150
        of_weights = (5 * R + 4) * U * weights + subnormal * np.exp2(s) + TINY
        return of_weights, (5 * R + 1) * U * left + subnormal, 5 * R * U * total + subnormal
    # Exponents: softplus2 4 U each, R sums on top of the carry, and the difference; ex2 2 U.
    spent = np.cumsum(softplus2(s)[:, ::-1], 1)[:, ::-1]
    carry = -np.log2(sticks)[:, None]
    exponent = (4 * spent + R * (spent + carry) + np.abs(s - spent - carry)) * U
    of_weights = (np.expm1(LN_2 * np.minimum(exponent, 100)) + 2 * U) * weights + TINY
    of_total = (4 + R) * U * spent[:, 0] + R * TINY / LN_2
    of_left = (np.expm1(LN_2 * (of_total + (spent + carry)[:, 0] * U)) + 2 * U) * left + TINY
    return of_weights, of_left, of_total


def check(what, got, truth, bound):
    over = ~(np.abs(got - truth) <= bound)
    assert not over.any(), f"{what} {got[over][:5]} at {np.argwhere(over)[:5].tolist()}: expected {truth[over][:5]}"
