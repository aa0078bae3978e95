"""Free lists: which cache rows and which source slots are taken. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable


class FreeList:
    """The numbers 0 .. size-1, each free or taken. Low numbers are given out first."""

    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, -1, -1))
        self._is_free = [True] * size

    @property
    def num_free(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` of them; raises ValueError when fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} asked for, {len(self._free)} free")
        taken = tuple(self._free.pop() for _ in range(count))
        for number in taken:
            self._is_free[number] = False
        return taken

    def give_back(self, numbers: Iterable[int]) -> None:
        """Free these again; raises ValueError for one that is not taken."""
        for number in numbers:
            if self._is_free[number]:
                raise ValueError(f"{number} is given back but was not taken")
            self._is_free[number] = True
            self._free.append(number)
