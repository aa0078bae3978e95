"""What became of a request, and the record of a run: one row per request, columns as arrays."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Outcome(enum.IntEnum):
    """Every way a request can end; exactly one per request sent."""

    PENDING = 0
    OK = 1
    REFUSED = 2
    CLIENT_ERROR = 3
    SERVER_ERROR = 4
    TIMEOUT = 5
    CONNECTION = 6
    MALFORMED = 7

    @property
    def meaning(self) -> str:
        """For people."""
        return _MEANINGS[self]

    @property
    def lost(self) -> bool:
        """Broken promises: no answer, a wrong one, or a 5xx that is not a clean refusal."""
        return self in (Outcome.SERVER_ERROR, Outcome.TIMEOUT, Outcome.CONNECTION, Outcome.MALFORMED)


_MEANINGS = {
    Outcome.PENDING: "not answered when the run was cut off",
    Outcome.OK: "200 with a translation for every text",
    Outcome.REFUSED: "503 with Retry-After: a clean refusal",
    Outcome.CLIENT_ERROR: "4xx: the workload and the service disagree",
    Outcome.SERVER_ERROR: "5xx, or 503 without Retry-After",
    Outcome.TIMEOUT: "no answer within the client's timeout",
    Outcome.CONNECTION: "connection refused, reset or closed",
    Outcome.MALFORMED: "200, but not the promised JSON",
}


def classify(status: int, headers: Mapping[str, str], body: bytes, num_texts: int) -> tuple[Outcome, int]:
    """Outcome and characters translated. `headers` is case-insensitive."""
    if status == 200:
        target_chars = _translated_chars(body, num_texts)
        return (Outcome.MALFORMED, 0) if target_chars is None else (Outcome.OK, target_chars)
    if status == 503 and headers.get("Retry-After"):
        return Outcome.REFUSED, 0
    if 400 <= status < 500:
        return Outcome.CLIENT_ERROR, 0
    return (Outcome.SERVER_ERROR if status >= 500 else Outcome.MALFORMED), 0


def _translated_chars(body: bytes, num_texts: int) -> int | None:
    """Characters of a complete answer (a non-empty text for every text sent), else None."""
    try:
        translations = json.loads(body)["translations"]
        texts = [translation["text"] for translation in translations]
    except (ValueError, KeyError, TypeError):
        return None
    if len(texts) != num_texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return sum(map(len, texts))


_TIMING = re.compile(r"([A-Za-z0-9_-]+)\s*;[^,]*?dur=([0-9.]+)")


def parse_server_timing(header: str) -> dict[str, float]:
    """Milliseconds by name from a W3C Server-Timing header."""
    return {name: float(value) for name, value in _TIMING.findall(header)}


_COLUMNS: Mapping[str, str] = {  # numpy types; the widest first, so that all lie at multiples of their size
    "sent_s": "f8",
    "done_s": "f8",
    "outcome": "i8",
    "status": "i8",
    "target_chars": "i8",
    "begun": "?",
    "held": "?",
    "retried": "?",
}


@dataclass(slots=True)
class Recording:
    """One row a request of the schedule. Times are seconds since the start of the run, NaN where nothing happened.

    intended_s: when the schedule wanted it sent, rising; begun: its turn came (rows that never begun say nothing else);
    sent_s: when its headers were written; done_s: when it ended (answer read, error seen or timeout). held: it had to wait
    because max_in_flight requests were out. server_s[name]: from Server-Timing.
    """

    intended_s: Floats
    sent_s: Floats
    done_s: Floats
    outcome: Ints
    status: Ints
    target_chars: Ints
    begun: npt.NDArray[np.bool_]
    held: npt.NDArray[np.bool_]
    retried: npt.NDArray[np.bool_]
    server_s: dict[str, Floats] = field(default_factory=dict)

    @staticmethod
    def num_bytes(size: int) -> int:
        """What the columns of `size` requests take, intended_s and server_s aside."""
        return size * sum(np.dtype(kind).itemsize for kind in _COLUMNS.values())

    @classmethod
    def within(cls, memory: Any, intended_s: Floats) -> Recording:
        """The record that lies in `memory`, a writable buffer of num_bytes: all who share the memory see the same."""
        views: dict[str, Any] = {}
        start = 0
        for name, kind in _COLUMNS.items():
            views[name] = np.frombuffer(memory, kind, len(intended_s), start)
            start += views[name].nbytes
        return cls(intended_s, **views)

    @classmethod
    def empty(cls, intended_s: Floats, memory: Any = None) -> Recording:
        """Nothing sent yet; in `memory` of zeros, if given."""
        recording = cls.within(memory or bytearray(cls.num_bytes(len(intended_s))), intended_s)
        recording.sent_s.fill(np.nan)
        recording.done_s.fill(np.nan)
        return recording

    def share(self, number: int, of: int) -> Recording:
        """Rows number, number + of, number + 2 of, ...: a view but for server_s, which starts empty."""
        return Recording(*(getattr(self, name)[number::of] for name in ("intended_s", *_COLUMNS)))

    def add_server_timing(self, number: int, of: int, server_s: Mapping[str, Floats]) -> None:
        """Durations of the rows of a share."""
        for name, column in server_s.items():
            self._server_column(name)[number::of] = column

    def record_server_timing(self, index: int, header: str) -> None:
        """Keep the durations that the service reports for one request."""
        for name, milliseconds in parse_server_timing(header).items():
            self._server_column(name)[index] = milliseconds / 1000

    def _server_column(self, name: str) -> Floats:
        if name not in self.server_s:
            self.server_s[name] = np.full(len(self.intended_s), np.nan)
        return self.server_s[name]

    def due(self, now_s: float) -> slice:
        """Rows whose time had come at now_s."""
        return slice(0, int(np.searchsorted(self.intended_s, now_s, side="right")))

    def never_sent(self) -> list[tuple[int, int]]:
        """First and last row of every gap: requests whose turn did not come."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], ~self.begun, [False]])))
        return [(int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]

    def latency_s(self) -> Floats:
        """From the intended send to the end: float64[N], NaN where it did not end."""
        return self.done_s - self.intended_s

    def good_and_bad(self, latency_s: float, now_s: float, warmup_s: float) -> tuple[int, int]:
        """Requests after the warm-up that met the limit, and those that can no longer meet it at now_s."""
        due = self.due(now_s)
        measured = self.begun[due] & (self.intended_s[due] >= warmup_s)
        pending = self.outcome[due] == Outcome.PENDING  # before the time: another process writes that first
        late = np.where(pending, now_s, self.done_s[due]) - self.intended_s[due] > latency_s
        good = measured & (self.outcome[due] == Outcome.OK) & ~late
        bad = measured & ~good & (~pending | late)
        return int(good.sum()), int(bad.sum())
