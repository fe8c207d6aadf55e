"""The host build of csrc/math.cuh against float64: variants of softplus2 and 1 - beta, and the runs of the stick step.

Bounds count roundings: U is the most that one rounding to float32 changes a number, relatively; a function of the mathematical
library is right to one unit of the last place, at most 2 U. Results or factors below 2^-126 are flushed, an absolute TINY.
"""

import numpy as np
import pytest
import torch

math = pytest.importorskip("sbkernels._C", reason="the extension sbkernels._C is not built").math

from sbkernels.bench import softplus  # noqa: E402

U, TINY, LN_2 = 2.0**-24, 2.0**-126, np.log(2)
STICKS = (1.0, 0.5, 2.0**-20, 2.0**-61)
FORMULATIONS = ("linear", "log")
ROWS = 2000
GROUPS = {name: group for name, _, group in math.variants()}
CUTS = {"1 - beta rcp": math.MAX_LOGIT2, "1 - beta rcp of 2": math.MAX_LOGIT2, "1 - beta rcp of 4": math.UNCUT}


def wide(x):
    return np.asarray(x, dtype=np.float64)


def softplus2(s):
    return np.logaddexp2(0.0, wide(s))


def one_minus_beta(s):
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp2(wide(s)))


def bound_of(variant, s, truth):
    """Largest absolute error of a variant's results; s and truth in float64."""
    if variant == "softplus2 polynomial":
        # The polynomial U / 2, ex2 2 U, the last two steps of the polynomial and the sum U each: 5.5 U, were all to meet. They
        # do not: 3.3 U is the most over all inputs. What the kernels rely on:
        return 2.0**-22 * truth + TINY / LN_2
    if variant == "softplus2 library":
        # exp2 and log1p 2 U each, LOG2_E and the product U each; above 25 less than U is cut off.
        return 6 * U * truth + TINY
    if variant == "softplus2 lg2":
        # 1 + 2^s: 3 U, times log2(e); log2 2 U. Above 15 log2(1 + 2^-s) is cut off.
        return 3 * U / LN_2 + 2 * U * truth + np.where(s > 15, softplus2(-s), 0.0)
    if variant == "1 - beta tanh":
        # Argument 2 U, at most 0.45 of which reach tanh; tanh U; the sum U / 2.
        return np.full_like(s, 2.5 * U)
    # Of the own factor 3 U; G - 1 products, the reciprocal 2 U, G products. Logits are cut.
    cut = one_minus_beta(np.minimum(s, CUTS[variant]))
    return (2 * GROUPS[variant] + 4) * U * cut + (cut - truth)


@pytest.mark.parametrize("variant", GROUPS)
def test_variant(variant):
    """On all exponents of both signs and a dense grid; groups once of neighbours, once of strangers."""
    s = softplus.samples()
    s = s[np.isfinite(s)]
    for inputs in (s, np.random.default_rng(0).permutation(s)):
        inputs = inputs[: len(inputs) // 4 * 4]
        truth = (softplus2 if variant.startswith("softplus2") else one_minus_beta)(inputs)
        error = np.abs(math.evaluate(variant, inputs) - truth)
        over = ~(error <= bound_of(variant, wide(inputs), truth))
        assert not over.any(), f"s = {inputs[over][:5]}: errors {error[over][:5]}"


@pytest.mark.parametrize("variant", GROUPS)
def test_variant_of_no_number(variant):
    G = GROUPS[variant]
    nan, inf, minus_inf = (math.evaluate(variant, np.full(G, x, dtype=np.float32)) for x in (np.nan, np.inf, -np.inf))
    assert np.isnan(nan).all()
    if variant.startswith("softplus2"):
        assert (inf == np.inf).all() and (minus_inf == 0).all()
    else:
        assert (inf >= 0).all() and (inf <= 2.0 ** -CUTS.get(variant, 126)).all() and (minus_inf == 1).all()


@pytest.mark.parametrize("variant", GROUPS)
def test_errors(variant):
    """What `sbk softplus` reports, against the same from numpy."""
    s = softplus.samples()[::7]
    zeros = math.errors_on_cpu(variant, np.array([-0.0, 0.0, -0.0], dtype=np.float32))
    assert not np.signbit([zeros.ulps_at, zeros.absolute_at]).any()  # of several inputs the smallest bits
    found = math.errors_on_cpu(variant, s)
    assert found.lost_nans == 0
    s = s[~np.isnan(s)]
    truth = (softplus2 if variant.startswith("softplus2") else one_minus_beta)(s)
    with np.errstate(invalid="ignore"):
        error = np.abs(math.evaluate(variant, np.repeat(s, GROUPS[variant])).reshape(len(s), -1) - truth[:, None]).max(1)
    counted = np.isfinite(s) & (truth >= 2.0**-125)
    ulps = error * np.exp2(24.0 - np.frexp(np.where(counted, truth, 1.0))[1])
    for name, values in (
        ("absolute", np.where(np.isnan(error), 0, error)),
        ("ulps", np.where(counted, ulps, 0)),
        ("ulps_uncut", np.where(counted & (np.abs(s) <= math.UNCUT), ulps, 0)),
    ):
        # A hundredth of U: what two float64 evaluations differ by.
        assert getattr(found, name) == pytest.approx(values.max(), rel=1e-6, abs=0.01 * U), name
        assert values[s == getattr(found, name + "_at")].max() == pytest.approx(values.max(), rel=1e-6, abs=0.01 * U), name


# ---- Runs ----


def logits(R):
    """{regime: base-2 logits [ROWS, R]}."""
    rng = np.random.default_rng(R)
    made = {
        "normal": rng.normal(0, 1, (ROWS, R)),
        "stick survives": rng.normal(-8, 1.5, (ROWS, R)),
        "large": rng.normal(0, 30, (ROWS, R)),
        "saturated": rng.choice([-150.0, 0.0, 150.0], (ROWS, R)),
        "all saturated": np.full((ROWS, R), 150.0),
        "around the cut": rng.uniform(60, 66, (ROWS, R)),
        "around a flush": rng.uniform(-130, -120, (ROWS, R)),
        "enormous": rng.choice([-1e30, -1e5, 0.0, 1e5, 1e30], (ROWS, R)),
        "infinite": rng.choice([-np.inf, 0.0, np.inf], (ROWS, R)),
    }
    return {name: s.astype(np.float32) for name, s in made.items()}


def cases():
    return [pytest.param(s, id=f"{name}-{R}") for R in (8, 16) for name, s in logits(R).items()]


def carries(formulation, rows):
    """Sticks [rows] as carries."""
    sticks = np.resize(np.array(STICKS), rows)
    return sticks, (sticks if formulation == "linear" else -np.log2(sticks)).astype(np.float32)


def sticks_of(formulation, carry):
    return wide(carry) if formulation == "linear" else np.exp2(-wide(carry))


def expected(s, sticks):
    """Eq. (3), 1 - beta and what is left, in float64 and log space, of logits cut at MAX_LOGIT2."""
    s = np.minimum(wide(s), math.MAX_LOGIT2)
    spent = np.cumsum(softplus2(s)[:, ::-1], 1)[:, ::-1]  # from this key to the newest
    return sticks[:, None] * np.exp2(s - spent), one_minus_beta(s), sticks * np.exp2(-spent[:, 0])


def bounds(formulation, s, sticks):
    """Largest absolute errors of what `expected` returns."""
    weights, rests, left = expected(s, sticks)
    s = np.minimum(wide(s), math.MAX_LOGIT2)
    R = s.shape[1]
    if formulation == "linear":
        # A pair: two ex2 2 U each, u, their product, the reciprocal and the running product U each: 8 U, 4 U a key. A weight has
        # the stick, its factor 1 + 2^s (3 U), its own 2^s (2 U) and two products besides. Pairs' products may be subnormal
        # numbers, each rounding of which is 2^-150 at most; so may their product with the stick.
        e = np.exp2(s)
        subnormal = (R / 2 + 1) * 2.0**-150
        factor = np.where(np.arange(R) % 2 == 1, 1 + np.roll(e, 1, 1), 1.0) * e
        of_weights = (4 * R + 8) * U * weights + subnormal * factor + TINY
        # 1 / pair 7 U, the other's factor 3 U.
        return of_weights, 10 * U * rests + TINY, (4 * R + 1) * U * left + subnormal
    # Exponents: softplus2 4 U each, R sums of at most what is spent, the difference, and the one with the carry; ex2 2 U.
    spent = np.cumsum(softplus2(s)[:, ::-1], 1)[:, ::-1]
    carry = -np.log2(sticks)[:, None]
    exponent = ((4 + R) * spent + np.maximum(np.abs(s), spent) + np.abs(s) + spent + carry) * U
    of_weights = (np.expm1(LN_2 * np.minimum(exponent, 100)) + 2 * U) * weights + TINY
    # The exponent of what is left: R softplus2, R sums, and the one with the carry.
    of_left = (((4 + R) * spent[:, :1] + spent[:, :1] + carry) * U * LN_2 + 2 * U)[:, 0] * left + TINY
    return of_weights, (LN_2 * 4 * softplus2(s) + 2) * U * rests + TINY, of_left


def check(what, got, truth, bound):
    over = ~(np.abs(got - truth) <= bound)
    assert not over.any(), f"{what} {got[over][:5]} at {np.argwhere(over)[:5].tolist()}: expected {truth[over][:5]}"


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("s", cases())
def test_run(formulation, s):
    """Weights, 1 - beta and totals; mass; what is passed on, and undone."""
    sticks, carry = carries(formulation, len(s))
    weights, rests, totals, exits, entries = math.run(formulation, s, carry)
    true_weights, true_rests, left = expected(s, sticks)
    of_weights, of_rests, of_left = bounds(formulation, s, sticks)
    check("weight", weights, true_weights, of_weights)
    check("1 - beta", rests, true_rests, of_rests)
    got_left = sticks * sticks_of(formulation, totals)
    check("left", got_left, left, of_left)
    check("mass", wide(weights).sum(1) + got_left, sticks, of_weights.sum(1) + of_left)
    # Cutting moves less than 2^-62 of a stick.
    beyond = (s > math.MAX_LOGIT2) & ~np.isinf(s)
    check("1 - beta beyond the cut", rests[beyond], one_minus_beta(s[beyond]), 2.0**-62)

    exit_sticks = sticks_of(formulation, exits)
    alive, gone = (left - of_left) > math.MIN_STICK, (left + of_left) < math.MIN_STICK
    check("exit", exit_sticks[alive], left[alive], of_left[alive] + 2 * U * left[alive])
    assert (exit_sticks[gone] == 0).all()
    # Undone, the exit's errors (linear: product, reciprocal, product; log: two sums of at most 124) stay.
    undone = sticks_of(formulation, entries[alive])
    check("entry", undone, sticks[alive], (4 if formulation == "linear" else 2 * 124 * LN_2) * U * sticks[alive])


@pytest.mark.parametrize("s", cases())
def test_formulations_agree(s):
    results, of_weights, of_rests = [], 0, 0
    for formulation in FORMULATIONS:
        sticks, carry = carries(formulation, len(s))
        results.append(math.run(formulation, s, carry))
        weight, rest, _ = bounds(formulation, s, sticks)
        of_weights, of_rests = of_weights + weight, of_rests + rest
    check("weight", wide(results[0][0]), results[1][0], of_weights)
    check("1 - beta", wide(results[0][1]), results[1][1], of_rests)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("s", cases())
def test_gradient(formulation, s):
    """Eq. (9)."""
    rng = np.random.default_rng(1)
    a, older = (rng.normal(size=s.shape).astype(np.float32) for _ in range(2))
    got = math.gradient(formulation, s, a, older)
    cut = np.minimum(wide(s), math.MAX_LOGIT2)
    rest, beta = one_minus_beta(cut), one_minus_beta(-cut)
    # Linear: 2^s 2 U, 1 - beta 10 U, the sum and the product. Log: both factors' exponents, ex2 2 U, the product and the sum.
    of_rest, of_beta = 14 * U, 14 * U
    if formulation == "log":
        cut = np.maximum(cut, -200)  # beta 0
        of_rest = (LN_2 * 4 * softplus2(cut) + 4) * U
        of_beta = (LN_2 * (4 * softplus2(cut) + softplus2(-cut)) + 4) * U
    bound = of_rest * np.abs(a) * rest + of_beta * np.abs(older) * beta + TINY * (np.abs(a) + np.abs(older))
    check("gradient", got, a * rest - beta * older, bound)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_nan(formulation):
    """A NaN reaches its own and all older keys' weights, the total and the exit; newer pairs of keys stay as they are."""
    s = logits(16)["normal"][:16].copy()
    _, carry = carries(formulation, len(s))
    before = math.run(formulation, s, carry)
    own = np.eye(16, dtype=bool)
    s[own] = np.nan
    weights, rests, totals, exits, _ = math.run(formulation, s, carry)
    older = np.tril(np.ones((16, 16), dtype=bool))
    newer_pairs = np.arange(16)[None, :] // 2 > np.arange(16)[:, None] // 2
    assert np.isnan(weights[older]).all() and np.isnan(rests[own]).all() and np.isnan(totals).all() and np.isnan(exits).all()
    assert (weights[newer_pairs] == before[0][newer_pairs]).all()
    assert np.isnan(math.run(formulation, np.zeros((1, 8), np.float32), np.array([np.nan], np.float32))[0]).all()


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("regime", logits(8))
def test_invisible_keys(formulation, regime):
    """They take nothing and, pair by pair, change no bit; in log space anywhere."""
    s = logits(8)[regime]
    _, carry = carries(formulation, len(s))
    few = math.run(formulation, s, carry)
    rng = np.random.default_rng(2)
    by_pairs = np.stack([2 * np.sort(rng.permutation(8)[:4]) for _ in s])
    anywhere = np.stack([np.sort(rng.permutation(16)[:8]) for _ in s])
    for places in [np.stack([by_pairs, by_pairs + 1], 2).reshape(-1, 8)] + [anywhere] * (formulation == "log"):
        many = np.full((len(s), 16), math.INVISIBLE, dtype=np.float32)
        np.put_along_axis(many, places, s, 1)
        hidden = np.ones(many.shape, dtype=bool)
        np.put_along_axis(hidden, places, False, 1)
        weights, rests, *others = math.run(formulation, many, carry)
        assert (weights[hidden] == 0).all() and (rests[hidden] == 1).all()
        for got, wanted in zip((weights[~hidden].reshape(s.shape), rests[~hidden].reshape(s.shape), *others), few, strict=True):
            np.testing.assert_array_equal(got, wanted)
        gradients = math.gradient(formulation, many, np.zeros_like(many), np.ones_like(many))
        assert (gradients[hidden] == 0).all()
    # Beside a visible key of its pair: as if it were not there.
    mixed = np.insert(s, range(8), np.float32(math.INVISIBLE), axis=1)
    sticks, _ = carries(formulation, len(s))
    weights, *_ = math.run(formulation, mixed, carry)
    bound = bounds(formulation, mixed, sticks)[0]
    check("weight", weights[:, 1::2], expected(s, sticks)[0], bound[:, 1::2])


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("R", (8, 16))
def test_one_key_uses_the_stick_up(formulation, R):
    """A whole stick survives one key up to a base-2 logit of 62 = -log2(MIN_STICK), none beyond it, wherever the key is."""
    assert math.MIN_STICK == 2.0**-62 and math.MAX_LOGIT2 > 62
    above = np.nextafter(np.float32(62), np.float32(63))
    for logit, left in ((np.float32(61), 2.0**-61), (np.float32(62), 2.0**-62), (above, 0.0), (np.float32(150), 0.0)):
        s = np.full((R, R), math.INVISIBLE, dtype=np.float32)
        s[np.eye(R, dtype=bool)] = logit
        carry = np.full(R, 1.0 if formulation == "linear" else 0.0, dtype=np.float32)
        weights, _, _, exits, _ = math.run(formulation, s, carry)
        assert (sticks_of(formulation, exits) == left).all() and (weights[np.eye(R, dtype=bool)] == 1).all()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_saturated_key_hides_older_ones(formulation):
    """z = 150: newer keys keep their weights, this one takes all that is left, older ones at most 2^-62 of it."""
    s = logits(16)["normal"]
    s[:, 7] = 150 / LN_2
    sticks, carry = carries(formulation, len(s))
    weights, _, _, exits, _ = math.run(formulation, s, carry)
    taken = wide(weights[:, 8:]).sum(1)
    check("weight", weights[:, 7], sticks - taken, bounds(formulation, s, sticks)[0][:, 7:].sum(1))
    assert (weights[:, :7] <= 2.0**-62 * sticks[:, None]).all() and (sticks_of(formulation, exits) == 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: math.evaluate("cosh", np.zeros(4, np.float32)), "expected one of 'softplus2 library'"),
        (lambda: math.evaluate("1 - beta rcp of 4", np.zeros(6, np.float32)), r"s has shape \(6,\): expected \(4,\)"),
        (lambda: math.run("cubic", np.zeros((2, 8), np.float32), np.zeros(2, np.float32)), "expected 'linear' or 'log'"),
        (lambda: math.run("log", np.zeros((2, 9), np.float32), np.zeros(2, np.float32)), r"expected shape \[n, 8\] or \[n, 16\]"),
        (
            lambda: math.run("log", np.zeros((2, 8), np.float32), np.zeros(3, np.float32)),
            r"carry has shape \(3,\): expected \(2,\)",
        ),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", GROUPS)
def test_on_gpu(variant):
    """Parts join to the whole, NaNs stay, softplus2 by the polynomial is right in its tail, and a clock is read."""
    begin, count = 0xC1000000, 2**24  # -8 to -32
    whole, joined = math.errors_on_gpu(variant, begin, count, 0, 0), math.Errors()
    for part in range(4):
        joined.take(math.errors_on_gpu(variant, begin + part * count // 4, count // 4, 0, 0))
    for name in ("ulps", "ulps_at", "ulps_uncut", "ulps_uncut_at", "absolute", "absolute_at", "lost_nans"):
        assert getattr(whole, name) == getattr(joined, name)
    assert math.errors_on_gpu(variant, 0x7F800001, 999, 0, 0).lost_nans == 0
    if variant == "softplus2 polynomial":
        # As for the host, but 4 U for ex2: 7.5 U, of which a unit of the last place is at least one.
        assert whole.ulps <= 7.5
    assert 0 < math.throughput_on_gpu(variant, 0, 0) < 128
