"""Splits: disjoint, exhaustive, stratified, and a function of the seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatl.data.source import Source, Split, in_memory
from gatl.data.splits import complete_splits
from gatl.errors import UserError

counts_of_classes = st.lists(st.integers(3, 60), min_size=2, max_size=6)


def make(counts: list[int], prefix: str = "x") -> Split:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return in_memory(np.zeros((len(labels), 1, 1), np.uint8), labels, prefix)


def bare(counts: list[int]) -> Source:
    return Source(tuple(f"c{i}" for i in range(len(counts))), make(counts))


def splits_of(source: Source) -> tuple[Split, Split, Split]:
    assert source.val is not None
    assert source.test is not None
    return source.train, source.val, source.test


@settings(max_examples=60, deadline=None)
@given(counts=counts_of_classes, seed=st.integers(0, 2**32 - 1))
def test_bare_split_is_disjoint_exhaustive_stratified(counts: list[int], seed: int) -> None:
    source = bare(counts)
    label_of = dict(zip(source.train.names, source.train.labels, strict=True))
    splits = splits_of(complete_splits(source, seed))
    names = [name for split in splits for name in split.names]
    assert sorted(names) == sorted(source.train.names)
    for split in splits:
        assert [label_of[name] for name in split.names] == split.labels.tolist()
        assert len(split.images) == len(split)
    for label, n in enumerate(counts):
        n_train, n_val, n_test = (int((split.labels == label).sum()) for split in splits)
        assert n_val == n_test == max(1, int(0.15 * n + 0.5))
        assert n_train >= 1


def test_seed_decides() -> None:
    first, again, other = (splits_of(complete_splits(bare([40, 50]), s)) for s in (7, 7, 8))
    assert [s.names for s in first] == [s.names for s in again]
    assert [s.names for s in first] != [s.names for s in other]


@pytest.mark.parametrize("given_split", ["val", "test"])
def test_a_missing_split_is_taken_from_train(given_split: str) -> None:
    official = make([5, 5], "official")
    source = Source(("a", "b"), make([20, 40]), **{given_split: official})
    completed = complete_splits(source, 0)
    assert getattr(completed, given_split) is official
    taken = getattr(completed, "test" if given_split == "val" else "val")
    assert np.bincount(taken.labels).tolist() == [3, 6]
    assert len(completed.train) == 51
    assert not set(taken.names) & set(completed.train.names)


def test_official_splits_stay() -> None:
    source = Source(("a", "b"), make([1, 1]), make([1, 1]), make([1, 1]))
    assert complete_splits(source, 0) is source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (bare([9]), "At least 2 classes are needed, but got 1 (c0)."),
        (bare([]), "At least 2 classes are needed, but got 0 (none)."),
        (
            bare([9, 2]),
            "Class 'c1' has too few images to split: at least 3 are needed in train, but got 2.",
        ),
        (
            Source(("a", "b"), make([5, 5]), make([0, 0])),
            "The val split has no images; add some or leave the split out.",
        ),
        (
            Source(("a", "b", "c"), make([5, 5, 0]), make([1, 1]), make([1, 1])),
            "Class 'c' has too few images to split: at least 1 are needed in train, but got 0.",
        ),
    ],
)
def test_errors_are_one_line(source: Source, message: str) -> None:
    with pytest.raises(UserError) as caught:
        complete_splits(source, 0)
    assert str(caught.value) == message
