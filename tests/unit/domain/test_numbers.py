"""A number that is said to be free was never taken, whatever the order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tink.domain import numbers
from tink.domain.numbers import Numbers


@given(st.lists(st.integers(0, 30) | st.integers(0, 10**18)))
def test_what_was_taken_is_never_free(taken: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "NUMBER_RUNS", 4)
        some = Numbers()
        for number in taken:
            some.take(number)
        assert not any(some.is_free(number) for number in taken)
        assert some.is_free(max([*taken, 40]) + 1)
        assert len(some._firsts) == len(some._behinds) <= 4


@given(st.lists(st.integers(0, 60), max_size=60))
def test_what_was_not_taken_is_free_as_long_as_all_of_it_is_kept(taken: list[int]) -> None:
    some = Numbers()
    for number in taken:
        some.take(number)
    assert [number for number in range(70) if not some.is_free(number)] == sorted(set(taken))
    runs = list(zip(some._firsts, some._behinds, strict=True))
    assert all(first < behind for first, behind in runs)
    assert all(behind < first for (_, behind), (first, _) in pairwise(runs))


def test_several_who_count_up_take_no_memory_and_the_next_is_free() -> None:
    some = Numbers()
    for number in (1, 0, 3, 2, *range(4, 5000)):
        for start in (0, 10**6, 10**9):
            assert some.is_free(start + number)
            some.take(start + number)
    assert some._firsts == [0, 10**6, 10**9]
    assert some.is_free(5000)
