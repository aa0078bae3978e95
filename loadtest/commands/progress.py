"""A progress bar over a run: sent, answered, still out."""

from __future__ import annotations

import sys

import numpy as np
from tqdm import tqdm

from loadtest.outcomes import Outcome, Recording


class Progress:
    """A monitor that draws and never stops a run. Close it after the run."""

    def __init__(self, total: int, title: str, *, hidden: bool) -> None:
        hidden = hidden or not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=title, unit="req", disable=hidden, leave=False, file=sys.stderr)

    def __call__(self, recording: Recording, now_s: float) -> bool:
        """Draw the state of the record."""
        due = recording.due(now_s)
        begun = recording.begun[due]
        outcome = recording.outcome[due][begun]
        pending, ok = int((outcome == Outcome.PENDING).sum()), int((outcome == Outcome.OK).sum())
        lag = (recording.sent_s[due] - recording.intended_s[due])[-100:]
        recent = lag[np.isfinite(lag)]
        worst_ms = f"{recent.max() * 1000:.1f}ms" if len(recent) else "-"
        self._bar.set_postfix(out=pending, ok=ok, other=len(outcome) - pending - ok, lag=worst_ms, refresh=False)
        self._bar.update(len(outcome) - self._bar.n)
        return False

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
