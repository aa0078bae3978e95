"""Free lists: nothing is given twice, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.slots import FreeList


@given(st.lists(st.integers(0, 6), max_size=60), st.data())
def test_taken_numbers_are_distinct_and_come_back(counts: list[int], data: st.DataObject) -> None:
    free_list, held = FreeList(17), []
    for count in counts:
        if count <= free_list.num_free:
            held.append(free_list.take(count))
        elif held:
            free_list.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
        taken = [number for numbers in held for number in numbers]
        assert len(set(taken)) == len(taken) == 17 - free_list.num_free
        assert set(taken) <= set(range(17))


def test_low_numbers_first() -> None:
    assert FreeList(5).take(3) == (0, 1, 2)


def test_taking_too_many_takes_none() -> None:
    free_list = FreeList(3)
    with pytest.raises(ValueError, match="4 asked for, 3 free"):
        free_list.take(4)
    assert free_list.num_free == 3


def test_giving_back_twice_is_an_error() -> None:
    free_list = FreeList(3)
    free_list.give_back(free_list.take(1))
    with pytest.raises(ValueError, match="not taken"):
        free_list.give_back((0,))
