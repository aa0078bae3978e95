"""What a person at the command line can fix."""

from __future__ import annotations


class LoadTestError(ValueError):
    """Bad input or a state that makes a run pointless; the message says what and how to fix it."""
