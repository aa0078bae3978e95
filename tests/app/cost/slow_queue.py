"""A queue that follows every group of requests, in exact arithmetic: the slow twin of app.cost.judge and app.cost.replay."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from fractions import Fraction

Number = int | Fraction


def late_requests(
    arrivals: Sequence[int], capacity: Sequence[Number], width: int, refuse: bool = False
) -> tuple[Number, list[Number]]:
    """Requests that wait over one second, in all and by the interval of `width` seconds in which that is known.

    arrivals and capacity per second; capacity may go on after the arrivals end. With `refuse`, work leaves the queue when
    it is late; without, it is served late. The share of a group that a second does not serve is late once that second is
    the one after its arrival.
    """
    waiting: deque[list[Number]] = deque()  # [second of arrival, requests left, 1 when counted late]
    found: list[Number] = []
    for second, available in enumerate(capacity):
        if second < len(arrivals):
            waiting.append([second, arrivals[second], 0])
        left: Number = available
        while waiting and left > 0:
            served = min(left, waiting[0][1])
            waiting[0][1] -= served
            left -= served
            if waiting[0][1] == 0:
                waiting.popleft()
        late: Number = 0
        for group in waiting:
            if second > group[0] and not group[2]:
                late += group[1]
                group[2] = 1
        if refuse:
            waiting = deque(group for group in waiting if not group[2])
        found.append(late)
    slots = [sum(found[start : start + width], Fraction(0)) for start in range(0, len(found), width)]
    return sum(found, Fraction(0)), slots
