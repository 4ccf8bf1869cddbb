"""Successive halving: its rungs, and who goes on."""

import pytest

from gatl.halving import rungs, survivors


@pytest.mark.parametrize(
    ("min_epochs", "reduction_factor", "max_epochs", "expected"),
    [
        (1, 3, 3, (1,)),
        (1, 3, 4, (1, 3)),
        (1, 3, 27, (1, 3, 9)),
        (2, 2, 9, (2, 4, 8)),
        (2, 4, 8, (2,)),
        (5, 2, 5, ()),
    ],
)
def test_rungs(min_epochs, reduction_factor, max_epochs, expected):
    assert rungs(min_epochs, reduction_factor, max_epochs) == expected


def test_survivors_are_the_lowest_losses():
    losses = {4: 0.9, 5: 0.1, 6: 0.5, 7: 0.3, 8: 0.7, 9: 0.2}
    assert survivors(losses, 3) == {5, 9}
    assert survivors(losses, 2) == {5, 9, 7}


def test_one_in_so_many_is_rounded_up():
    assert survivors({0: 1.0}, 3) == {0}
    assert survivors({0: 1.0, 1: 0.5, 2: 2.0, 3: 3.0}, 3) == {1, 0}
    assert survivors({}, 3) == frozenset()


def test_ties_go_to_the_lower_number():
    assert survivors({3: 0.5, 1: 0.5, 2: 0.5}, 2) == {1, 2}
