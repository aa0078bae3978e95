"""What every launcher needs: argument checks and launch arithmetic."""

from __future__ import annotations


def check(condition: bool, message: str) -> None:
    """Raise ValueError with a message that names the fix."""
    if not condition:
        raise ValueError(message)


def next_power_of_two(n: int) -> int:
    """Smallest power of two >= n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()
