"""A number that is said to be free was never taken, whatever the order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tink.domain import numbers
from tink.domain.numbers import Numbers


@given(st.lists(st.integers(0, 30) | st.integers(0, 10**18)))
def test_what_was_taken_is_never_free(taken: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "SCATTERED_NUMBERS", 4)
        some = Numbers()
        for number in taken:
            some.take(number)
        assert not any(some.is_free(number) for number in taken)
        assert some.is_free(max([*taken, 40]) + 1)
        assert len(some._above) <= 4


def test_numbers_that_are_counted_up_take_no_memory_and_the_next_is_free() -> None:
    some = Numbers()
    for number in (1, 0, 3, 2, *range(4, 5000)):
        assert some.is_free(number)
        some.take(number)
    assert some._above == set()
    assert some.is_free(5000)
