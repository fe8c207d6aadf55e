"""Strategies and lookups on recorded full measurements: how near they come to the best. Figures are printed: run with -s."""

import collections
import pathlib

import pytest

from sbkernels.tuning import keys, replay
from sbkernels.tuning.lookup import octaves
from sbkernels.tuning.strategies import STRATEGIES

SPACES = pathlib.Path(__file__).parent / "data" / "tuning-spaces.json"


@pytest.fixture(scope="module")
def spaces():
    return replay.spaces(SPACES)


def test_the_guided_search_comes_near_the_best(spaces):
    """Within 2 % of the exhaustive best by 15 % of the space, on recorded full measurements."""
    pytest.importorskip("optuna")
    wide = [space for space in spaces if len(space) >= 64]
    found = {name: replay.regrets(wide, name, 0.15, seeds=30 if name == "random" else 5) for name in ("random", "guided")}
    for name, regrets in found.items():
        median, most = (replay.quantile(regrets, share) for share in (0.5, 0.95))
        print(f"\n{name}: 15 % of {len(wide)} spaces: {median:.2%} from the best at the median, {most:.2%} at 95 %")
    assert replay.quantile(found["guided"], 0.5) <= 0.02
    assert replay.regrets(spaces, "exhaustive", 1.0, seeds=1) == [0.0] * len(spaces)


def test_strategies_try_each_config_once_and_the_default_first(spaces):
    space = spaces[0].configs
    for name, strategy in STRATEGIES.items():
        if name == "guided":
            pytest.importorskip("optuna")
        made = strategy(space, 3, hints=[2, 1])
        order = []
        while (number := made.ask()) is not None:
            made.tell(number, None if number == 2 else 1.0 + number)
            order.append(number)
        assert order[:3] == [0, 2, 1] and len(set(order)) == len(order)
        assert len(order) == (len(space) if name == "exhaustive" else max(2, int(0.15 * len(space)))), name


def test_neighbours_serve_well(spaces):
    """Leaving one shape out of fully measured ones: how much slower what is served is than the best of all; printed."""
    found = collections.defaultdict(list)
    for space in spaces:
        found[keys.canonical(space.problem["exact"])].append(space)
    machine, regrets = {"cores": 2}, []
    for alike in found.values():
        for left_out in alike:
            rows = []
            for space in alike:
                config = space.configs[space.confirmed]
                distance = octaves(space.problem["sizes"], left_out.problem["sizes"], machine, machine, config)
                if space is not left_out and distance is not None:
                    rows.append((distance, space.problem["sizes"]["keys"], config))
            served = min(rows, key=lambda row: row[:2])[2]
            regrets.append(left_out.times[left_out.configs.index(served)] / left_out.best - 1)
    median, most = (replay.quantile(regrets, share) for share in (0.5, 0.95))
    print(f"\n{len(regrets)} shapes served by neighbours: {median:.2%} slower than the best at the median, {most:.2%} at 95 %")
    assert len(regrets) >= 10 and median <= 0.03 and most <= 0.10
