"""The host build of csrc/math.cuh against float64: the runs of the stick step, by either formulation and path."""

import numpy as np
import pytest
from math_oracle import (
    EXACT,
    EXCESS,
    GROUP,
    IS_SIMPLE,
    LN_2,
    LOG,
    MIXED,
    REST,
    ROWS,
    RUNS,
    SIMPLE,
    TINY,
    U,
    bounds,
    carries,
    case,
    cases,
    check,
    excess_of,
    expected,
    identity,
    logits,
    math,
    number,
    of_paths,
    of_paths_for_all,
    one_minus_beta,
    run,
    run_where_taken,
    softplus2,
    sticks_of,
    wide,
)


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
    groups = np.stack([excess_of(part) for part in np.split(s, R // GROUP[R], 1)], 1)
    simple, of_excess = run(SIMPLE, s, np.ones(len(s), np.float32))["simple"], 4 * R * U
    assert simple[(groups * (1 + of_excess) < math.SIMPLE_LIMIT).all(1)].all()
    assert not simple[(~(groups < math.SIMPLE_LIMIT * (1 + of_excess))).any(1)].any()
    if name == "around SIMPLE_LIMIT":
        assert 0.2 < simple.mean() < 0.8
    simple, spent, of_spent = run(LOG, s, np.zeros(len(s), np.float32))["simple"], softplus2(s).sum(1), (R + 4) * U
    assert simple[spent * (1 + of_spent) < math.MAX_LOGIT2].all()
    assert not simple[~(spent < math.MAX_LOGIT2 * (1 + of_spent))].any()


def test_four_runs_that_use_the_stick_up():
    """Of the runs of a row, the largest totals all of them: no NaN, and nothing is left."""
    total, whole, none = np.full((1, 1), math.MAX_EXCESS, np.float32), np.ones(1, np.float32), np.zeros((1, 1), np.float32)
    pair = math.step(*SIMPLE, "combine", total, total)
    four = math.step(*SIMPLE, "combine", pair, pair)
    assert pair == 2.0**126 and four == np.inf
    assert math.step(*SIMPLE, "combine", none, pair) == pair == math.step(*SIMPLE, "combine", pair, none)
    for excess in (total, pair, four):
        assert math.step(*SIMPLE, "advance", whole, excess) == 0
        assert math.step(*SIMPLE, "enter", whole, excess) <= 2.0**-63


@of_paths
def test_combine(path):
    """Totals of halves give the whole's; IDENTITY's changes nothing."""
    whole, half = logits(16), {name: (s[:, :8].copy(), s[:, 8:].copy()) for name, s in logits(16).items()}
    for name, s in whole.items():
        sticks, carry = carries(path[0], len(s))
        taken = run(path, s, carry)["simple"] | (path != SIMPLE)
        totals = [run(path, part, carry)["total"] for part in half[name]]
        both = number(path, math.step(*path, "combine", *totals))
        both = np.minimum(both, math.MAX_EXCESS) if path == SIMPLE else both
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
    check("left", *lefts, of_left + 2.0**-63 * sticks[taken])  # a run's excess is cut at 2^63
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
    # As many keys in each group of the run, which they cannot leave without another order of sums.
    group, groups = GROUP[2 * R], 2 * R // GROUP[2 * R]
    at = [np.concatenate([np.sort(rng.permutation(group)[: R // groups]) + i * group for i in range(groups)]) for _ in s]
    first = np.concatenate([np.arange(R // groups) + i * group for i in range(groups)])

    def among_hidden(places):
        many = np.full((len(s), 2 * R), math.INVISIBLE, dtype=np.float32)
        np.put_along_axis(many, places, s, 1)
        return many

    places = np.stack(at)
    many, hidden = among_hidden(places), np.ones((len(s), 2 * R), dtype=bool)
    np.put_along_axis(hidden, places, False, 1)
    got = run(path, many, carry)
    if groups == 1:
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
        assert (run(SIMPLE, s, np.ones(R, np.float32))["simple"] == (logit < 62)).all()


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


def test_paths_of_the_log_run_differ_where_logits_are_cut():
    """The simple one is taken where none is, and gives the same bits there."""
    found = set()
    for s in logits(16).values():
        _, carry = carries("log", len(s))
        simple, mixed, exact = (run(("log", path), s, carry) for path in ("simple", "mixed", "exact"))
        taken = simple["simple"]
        assert (np.fmax.reduce(s[taken], axis=1, initial=-np.inf) < math.MAX_LOGIT2).all()
        found |= set(taken)
        for key, values in simple.items():
            np.testing.assert_array_equal(values[taken], mixed[key][taken])
            np.testing.assert_array_equal(mixed[key], exact[key])
    assert found == {True, False}
