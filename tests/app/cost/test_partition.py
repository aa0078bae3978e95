"""The search over subsets and the merging, against every partition written out one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from app.cost.partition import Members, best_partition, merged_partition


def partitions(members: list[int]) -> Iterator[list[list[int]]]:
    if not members:
        yield []
        return
    first, *rest = members
    for partition in partitions(rest):
        yield [[first], *partition]
        for index, group in enumerate(partition):
            yield [*partition[:index], [first, *group], *partition[index + 1 :]]


def total(partition: list[Members], cost: dict[Members, float]) -> float:
    assert sorted(member for group in partition for member in group) == list(range(max(map(max, partition)) + 1))
    return sum(cost[group] for group in partition)


def random_costs(rng: np.random.Generator, count: int) -> dict[Members, float]:
    groups = [frozenset(i for i in range(count) if mask >> i & 1) for mask in range(1, 1 << count)]
    return {group: float(rng.uniform(0, 1) * len(group) ** rng.choice([0.3, 1.0])) for group in groups}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_no_partition_is_cheaper_than_the_best(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(3):
        cost = random_costs(rng, count)
        cheapest = min(sum(cost[frozenset(group)] for group in each) for each in partitions(list(range(count))))
        assert total(best_partition(count, cost.__getitem__), cost) == pytest.approx(cheapest)


def test_infinite_costs_are_avoided() -> None:
    cost = {group: np.inf if len(group) == 1 else 1.0 for group in random_costs(np.random.default_rng(0), 4)}
    found = best_partition(4, cost.__getitem__)
    assert total(found, cost) == 1.0
    assert found == [frozenset(range(4))]


@pytest.mark.parametrize("seed", range(12))
def test_merging_finds_groups_that_are_there_and_ends_no_higher_than_its_ends(seed: int) -> None:
    """Members of three hidden families cost little together and much with others; a group has a fixed cost."""
    rng = np.random.default_rng(seed)
    family = rng.integers(0, 3, 14)
    size = rng.uniform(0.5, 3, 14)

    def cost(group: Members) -> float:
        inside = list(group)
        return 1.5 + float(size[inside].sum()) * (1 + 0.6 * (len(set(family[inside].tolist())) - 1))

    found = merged_partition(14, cost)
    assert sorted(map(sorted, found)) == sorted(sorted(np.flatnonzero(family == kind).tolist()) for kind in set(family))
    assert sum(map(cost, found)) <= min(cost(frozenset(range(14))), sum(cost(frozenset([i])) for i in range(14)))


def test_merging_leaves_apart_what_is_cheaper_apart() -> None:
    assert len(merged_partition(6, lambda group: len(group) ** 1.5)) == 6
    assert merged_partition(6, lambda group: len(group) ** 0.5) == [frozenset(range(6))]
    assert merged_partition(1, lambda group: 1.0) == [frozenset([0])]
