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


RUNS = (4, 8, 16, 32)
PART = {4: 4, 8: 8, 16: 16, 32: 8}  # keys of a part of a run
# What LinearRun's two paths choose from: MIXED takes the one or the other, EXACT is MIXED with no row taken for simple. LogRun's
# paths are one.
SIMPLE, MIXED, EXACT, LOG = ("linear", "simple"), ("linear", "mixed"), ("linear", "exact"), ("log", "mixed")
PATHS = (SIMPLE, EXACT, LOG)
of_paths = pytest.mark.parametrize("path", PATHS, ids="-".join)
of_paths_for_all = pytest.mark.parametrize("path", PATHS[1:], ids="-".join)
EXCESS, REST, IS_SIMPLE = range(3)  # columns of a total of MIXED and EXACT


def logits(R, rows=ROWS):
    """{regime: base-2 logits [rows, R]}."""
    rng = np.random.default_rng(R)
    shape = (rows, R)
    made = {
        "normal": rng.normal(0, 1, shape),
        "stick survives": rng.normal(-8, 1.5, shape),
        "small shares": rng.uniform(-34, -24, shape),
        "around SIMPLE_LIMIT": rng.choice([30.0, -30.0], shape, p=(1 / R, 1 - 1 / R)) + rng.normal(0, 0.01, shape),
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
    total = {SIMPLE: excess_of(s), EXACT: np.exp2(-spent[:, 0])}.get(path, spent[:, 0])
    return sticks[:, None] * np.exp2(s - spent), sticks * np.exp2(-spent[:, 0]), total


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


@of_paths
@pytest.mark.parametrize(("name", "R"), cases())
def test_run(path, name, R):
    """Weights and totals; mass; what is passed on, and undone."""
    s = case(name, R)
    s, sticks, got = run_where_taken(path, s, *carries(path[0], len(s)))
    weights, left, total = expected(path, s, sticks)
    of_weights, of_left, of_total = bounds(path, s, sticks)
    check("weight", got["weights"], weights, of_weights)
    check("total", number(path, got["total"]), total, of_total)
    entered = sticks_of(path[0], got["enter"])
    check("enter", entered, left, of_left)
    # All of the weights' errors, at worst; and what cutting leaves.
    check("mass", wide(got["weights"]).sum(1) + entered, sticks, of_weights.sum(1) + of_left + 2.0**-62 * sticks)

    exits = sticks_of(path[0], got["advance"])
    alive, gone = left - of_left > math.MIN_STICK, left + of_left < math.MIN_STICK
    if path == SIMPLE:
        # Of a small share, all digits and one rounding.
        of_advance = np.where(total < 0.9, (4 * s.shape[1] + 3) * U * (sticks - left) + U * left + s.shape[1] * TINY, of_left)
    else:
        of_advance = of_left
    check("advance", exits[alive], left[alive], of_advance[alive])
    assert (got["advance"][gone] == math.constants(*path)["NONE"]).all()
    assert got["alive"][alive].all() and not got["alive"][gone].any() and (got["stick"][gone] == 0).all()
    check("stick", got["stick"], exits, 2 * U * exits + TINY)
    # Simple: 1 + total, the reciprocal, two products and a sum; exact: two products, the reciprocal; log: the sum, the difference.
    of_undo = {SIMPLE: 5 * U, EXACT: 3 * U}.get(path, 2 * 64 * LN_2 * U)
    check("undo", sticks_of(path[0], got["undo"])[alive], sticks[alive], of_undo * sticks[alive])


@pytest.mark.parametrize("name", logits(4, 1))
@pytest.mark.parametrize("R", RUNS)
def test_simple_where_below_its_limit(name, R):
    s = logits(R)[name]
    simple, excess, of_excess = run(SIMPLE, s, np.ones(len(s), np.float32))["simple"], excess_of(s), 4 * R * U
    assert simple[excess * (1 + of_excess) < math.SIMPLE_LIMIT].all()
    assert not simple[~(excess < math.SIMPLE_LIMIT * (1 + of_excess))].any()
    if name == "around SIMPLE_LIMIT":
        assert 0.2 < simple.mean() < 0.8
    assert run(LOG, s, np.zeros(len(s), np.float32))["simple"].all()


def test_four_runs_below_the_limit():
    """Of the runs of a row, just simple all of them, product and reciprocal are numbers."""
    assert math.SIMPLE_LIMIT == 2.0**30
    total = np.array([[np.nextafter(np.float32(2.0**30), np.float32(0))]])
    pair = math.step(*SIMPLE, "combine", total, total)
    four = math.step(*SIMPLE, "combine", pair, pair)
    whole = np.ones(1, np.float32)
    check("combine", four, wide((wide(total) + 1) ** 4 - 1), 8 * U * four)
    check("enter", math.step(*SIMPLE, "enter", whole, four), 1 / (1 + wide(total[0])) ** 4, 11 * U * 2.0**-120)
    assert math.step(*SIMPLE, "advance", whole, four) == 0


@of_paths
def test_combine(path):
    """Totals of halves give the whole's; IDENTITY's changes nothing."""
    whole, half = logits(16), {name: (s[:, :8].copy(), s[:, 8:].copy()) for name, s in logits(16).items()}
    for name, s in whole.items():
        sticks, carry = carries(path[0], len(s))
        taken = run(path, s, carry)["simple"] | (path != SIMPLE)
        totals = [run(path, part, carry)["total"] for part in half[name]]
        both = number(path, math.step(*path, "combine", *totals))
        _, _, total = expected(path, s, sticks)
        of_total = bounds(path, s, sticks)[2] + 2 * U * total
        check("combine", both[taken], total[taken], of_total[taken])
        same = math.step(*path, "combine", totals[0], identity(path, len(s)))
        np.testing.assert_array_equal(number(path, same)[taken], number(path, totals[0])[taken])
        np.testing.assert_array_equal(math.step(*path, "advance", carry, identity(path, len(s))), carry)


@pytest.mark.parametrize(("name", "R"), cases())
def test_mixed_path_selects(name, R):
    """Of a simple run all that SIMPLE gives, of any other all that EXACT does: to the bit."""
    s = case(name, R)
    rng = np.random.default_rng(3)
    more = [carries("linear", len(s))[1], *(rng.normal(size=s.shape).astype(np.float32) for _ in range(2))]
    mixed = run(MIXED, s, *more)
    is_simple = mixed["simple"]
    np.testing.assert_array_equal(mixed["total"][:, IS_SIMPLE], is_simple)
    for path, rows, column in ((SIMPLE, is_simple, EXCESS), (EXACT, ~is_simple, REST)):
        answers = run(path, s, *more)
        assert same_bits(mixed["total"][:, column], number(path, answers["total"]), rows), "total"
        for key in answers.keys() - {"total"}:
            assert same_bits(mixed[key], answers[key], rows), key
    if name in ("stick survives", "small shares"):
        assert is_simple.mean() > 0.9
    if name == "around SIMPLE_LIMIT":
        assert 0.2 < is_simple.mean() < 0.8


def same_bits(x, y, rows):
    return x[rows].tobytes() == y[rows].tobytes()


@pytest.mark.parametrize("name", logits(8, 1))
def test_mixed_path_of_a_row(name):
    """Totals of 4 runs: a row is simple if all of them are, and its steps are then SIMPLE's, else EXACT's, to the bit."""
    runs = np.split(logits(8, 4 * ROWS)[name], 4)
    carry = carries("linear", ROWS)[1]
    rows = {}
    for path in (SIMPLE, MIXED, EXACT):
        a, b, c, d = (run(path, s, carry)["total"] for s in runs)
        pair, other = math.step(*path, "combine", a, b), math.step(*path, "combine", c, d)
        rows[path] = math.step(*path, "combine", pair, other)
    is_simple = np.all([run(SIMPLE, s, carry)["simple"] for s in runs], axis=0)
    np.testing.assert_array_equal(rows[MIXED][:, IS_SIMPLE], is_simple)
    for step in ("enter", "advance", "undo"):
        simple, mixed, exact = (math.step(*path, step, carry, total) for path, total in rows.items())
        assert same_bits(mixed, simple, is_simple) and same_bits(mixed, exact, ~is_simple), step


@pytest.mark.parametrize("R", RUNS)
def test_small_shares_keep_their_digits(R):
    """Keys of which 1 + 2^s is 1: a run's total, and the stick that 2^27 of them take an eighth of."""
    s = np.full((1, R), -30, dtype=np.float32)
    total = run(SIMPLE, s, np.ones(1, np.float32))["total"]
    check("total", total[0], excess_of(s), 2.0**-20 * excess_of(s))
    keys = R
    while keys < 2**27:
        total, keys = math.step(*SIMPLE, "combine", total, total), 2 * keys
    taken = -np.expm1(-keys * np.log1p(2.0**-30))
    left = math.step(*SIMPLE, "advance", np.ones(1, np.float32), total)
    check("taken", 1 - wide(left), np.array([taken]), 2.0**-20 * taken)
    check("undo", math.step(*SIMPLE, "undo", left, total), np.ones(1), 5 * U)


@pytest.mark.parametrize("linear", (SIMPLE, EXACT), ids="-".join)
@pytest.mark.parametrize(("name", "R"), cases())
def test_formulations_agree(name, R, linear):
    s = case(name, R)
    taken = run(linear, s, carries("linear", len(s))[1])["simple"] | (linear != SIMPLE)
    weights, rests, lefts, of_weights, of_left = [], [], [], 0, 0
    for path in (linear, LOG):
        sticks, carry = carries(path[0], len(s))
        got = run(path, s, carry)
        weights.append(wide(got["weights"])[taken])
        rests.append(wide(got["gradient"])[taken])
        lefts.append(sticks_of(path[0], got["enter"])[taken])
        bound = bounds(path, s[taken], sticks[taken])
        of_weights, of_left = of_weights + bound[0], of_left + bound[1]
    check("weight", *weights, of_weights)
    check("left", *lefts, of_left)
    cut = np.minimum(wide(s[taken]), math.MAX_LOGIT2)
    check("1 - beta", *rests, (12 + LN_2 * 4 * softplus2(cut)) * U * one_minus_beta(cut) + TINY)


@of_paths
@pytest.mark.parametrize(("name", "R"), cases())
def test_gradient(path, name, R):
    """Eq. (9)."""
    rng = np.random.default_rng(1)
    s = case(name, R)
    a, older = (rng.normal(size=s.shape).astype(np.float32) for _ in range(2))
    got = run(path, s, carries(path[0], len(s))[1], a, older)
    cut = np.minimum(wide(s), math.MAX_LOGIT2)
    rest, beta = one_minus_beta(cut), one_minus_beta(-cut)
    # Linear: 2^s 2 U, the sum, u and its 2^s 3 U, the reciprocal and the product. Log: both factors' exponents, ex2 2 U, the
    # product and the sum.
    of_rest = of_beta = 8 * U
    if path[0] == "log":
        cut = np.maximum(cut, -200)  # beta 0
        of_rest = (LN_2 * 4 * softplus2(cut) + 4) * U
        of_beta = (LN_2 * (4 * softplus2(cut) + softplus2(-cut)) + 4) * U
    bound = of_rest * np.abs(a) * rest + of_beta * np.abs(older) * beta + TINY * (np.abs(a) + np.abs(older))
    taken = got["simple"] | (path != SIMPLE)
    check("gradient", got["gradient"][taken], (a * rest - beta * older)[taken], bound[taken])
    # Cutting moves 1 - beta by less than 2^-62.
    beyond = (s > math.MAX_LOGIT2) & taken[:, None]
    check("cut", (a * rest - beta * older)[beyond], -wide(older)[beyond], 2.0**-62 * (np.abs(a) + np.abs(older))[beyond])


@of_paths_for_all
@pytest.mark.parametrize("R", RUNS)
def test_nan(path, R):
    """Never simple. It reaches its own and all older keys' weights, the total and the carries; newer keys stay as they are."""
    s = logits(R)["normal"][:R].copy()
    _, carry = carries(path[0], len(s))
    before = run(path, s, carry)
    own = np.eye(R, dtype=bool)
    s[own] = np.nan
    got = run(path, s, carry)
    older = np.tril(np.ones((R, R), dtype=bool))
    assert np.isnan(got["weights"][older]).all() and np.isnan(got["gradient"][own]).all()
    assert np.isnan(number(path, got["total"])).all()
    for name in ("enter", "advance", "undo", "stick"):
        assert np.isnan(got[name]).all(), name
    np.testing.assert_array_equal(got["weights"][~older], before["weights"][~older])
    np.testing.assert_array_equal(got["gradient"][~own], before["gradient"][~own])
    assert not run(SIMPLE, s, carry)["simple"].any()
    # Among saturated keys and beside infinite ones, too.
    for other in (150.0, np.inf, -np.inf):
        s[~own] = other
        got = run(path, s, carry)
        assert np.isnan(got["weights"][own]).all() and np.isnan(number(path, got["total"])).all()
        assert not run(SIMPLE, s, carry)["simple"].any()


@of_paths
def test_nan_carry(path):
    got = run(path, np.zeros((1, 8), np.float32), np.array([np.nan], np.float32))
    for name in ("weights", "enter", "advance", "undo", "stick"):
        assert np.isnan(got[name]).all(), name


@of_paths
@pytest.mark.parametrize("name", logits(8, 1))
@pytest.mark.parametrize("R", RUNS[:3])
def test_invisible_keys(path, name, R):
    """They take nothing and, wherever they are, change no bit."""
    s = logits(R)[name]
    _, carry = carries(path[0], len(s))
    rng = np.random.default_rng(2)
    # As many keys in each part of the run, which they cannot leave without another order of sums.
    part, parts = PART[2 * R], 2 * R // PART[2 * R]
    at = [np.concatenate([np.sort(rng.permutation(part)[: R // parts]) + i * part for i in range(parts)]) for _ in s]
    first = np.concatenate([np.arange(R // parts) + i * part for i in range(parts)])

    def among_hidden(places):
        many = np.full((len(s), 2 * R), math.INVISIBLE, dtype=np.float32)
        np.put_along_axis(many, places, s, 1)
        return many

    places = np.stack(at)
    many, hidden = among_hidden(places), np.ones((len(s), 2 * R), dtype=bool)
    np.put_along_axis(hidden, places, False, 1)
    got = run(path, many, carry)
    if parts == 1:
        few = run(path, s, carry)
    else:
        few = run(path, among_hidden(np.tile(first, (len(s), 1))), carry)
        few = {key: x[:, first] if key in ("weights", "gradient") else x for key, x in few.items()}
    np.testing.assert_array_equal(got["simple"], few["simple"])
    taken = few["simple"] | (path != SIMPLE)
    for key, wanted in few.items():
        found = got[key][~hidden].reshape(s.shape) if key in ("weights", "gradient") else got[key]
        found, wanted = (number(path, x) if key == "total" else x for x in (found, wanted))
        np.testing.assert_array_equal(found[taken], wanted[taken], key)
    hidden &= taken[:, None]
    assert (got["weights"][hidden] == 0).all() and (got["gradient"][hidden] == 1).all()
    assert (run(path, many, carry, np.zeros_like(many), np.ones_like(many))["gradient"][hidden] == 0).all()


@of_paths
@pytest.mark.parametrize("name", logits(8, 1))
def test_used_up_stick(path, name):
    """Nothing comes of it, and it stays used up."""
    s, none = logits(8)[name], math.constants(*path)["NONE"]
    s, _, got = run_where_taken(path, s, np.zeros(len(s)), np.full(len(s), none, dtype=np.float32))
    assert (got["weights"] == 0).all() and (got["advance"] == none).all() and not got["alive"].any() and (got["stick"] == 0).all()


@of_paths_for_all
@pytest.mark.parametrize("R", RUNS)
def test_one_key_uses_the_stick_up(path, R):
    """A whole stick survives one key up to a base-2 logit of 62 = -log2(MIN_STICK), none beyond it, wherever the key is."""
    assert math.MIN_STICK == 2.0**-62 and math.MAX_LOGIT2 > 62
    above = np.nextafter(np.float32(62), np.float32(63))
    for logit, left in ((61, 2.0**-61), (62, 2.0**-62), (above, 0.0), (63, 0.0), (127, 0.0), (128, 0.0), (150, 0.0), (np.inf, 0.0)):
        s = np.full((R, R), math.INVISIBLE, dtype=np.float32)
        s[np.eye(R, dtype=bool)] = logit
        got = run(path, s, np.full(R, math.constants(*path)["WHOLE"], dtype=np.float32))
        assert (sticks_of(path[0], got["advance"]) == left).all() and (got["weights"][np.eye(R, dtype=bool)] == 1).all()
        assert not run(SIMPLE, s, np.ones(R, np.float32))["simple"].any()


@of_paths_for_all
@pytest.mark.parametrize("saturated", (150 / LN_2, np.inf))
def test_saturated_key_hides_older_ones(path, saturated):
    """z = 150: newer keys keep their weights, this one takes all that is left, older ones at most 2^-62 of it."""
    s = logits(16)["normal"]
    s[:, 7] = saturated
    sticks, carry = carries(path[0], len(s))
    got = run(path, s, carry)
    taken = wide(got["weights"][:, 8:]).sum(1)
    check("weight", got["weights"][:, 7], sticks - taken, bounds(path, s, sticks)[0][:, 7:].sum(1))
    assert (got["weights"][:, :7] <= 2.0**-62 * sticks[:, None]).all() and (sticks_of(path[0], got["advance"]) == 0).all()


def test_paths_of_the_log_run_are_one():
    for s in logits(16).values():
        _, carry = carries("log", len(s))
        simple, mixed, exact = (run(("log", path), s, carry) for path in ("simple", "mixed", "exact"))
        for key, values in simple.items():
            np.testing.assert_array_equal(values, mixed[key])
            np.testing.assert_array_equal(values, exact[key])


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
