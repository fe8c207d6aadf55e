"""Large problems are checked in places; what is wrong there is found."""

import pytest
import torch

from sbkernels.verify import inputs, spots
from sbkernels.verify.run import attend


def test_spots_find_what_small_problems_do_not(monkeypatch):
    """Rows and newest keys of a long problem are checked against float64 without computing all of it."""
    monkeypatch.setattr(spots, "WHOLE_LOGITS", 0)
    x = inputs.make(inputs.Case(M=200, N=300, D=16, Dv=16), torch.float32, "cpu")
    found, got = spots.spots(x), attend(x)
    assert all(f.ok for f in spots.judge_spots(found, got))
    for tensor, row in ((0, -1), (0, 70), (1, 199), (2, 99), (3, -2), (4, 240)):
        broken = [t.clone() for t in got]
        broken[tensor][:, :, row] *= 1.01
        assert not all(f.ok for f in spots.judge_spots(found, broken)), (tensor, row)


@pytest.mark.parametrize("lengths", [(40, 0, 30), (1,)])
def test_spots_of_packed_sequences(lengths):
    x = inputs.make(inputs.Case(lengths=lengths, D=16, Dv=16), torch.float32, "cpu")
    assert all(f.ok for f in spots.judge_spots(spots.spots(x), attend(x)))
