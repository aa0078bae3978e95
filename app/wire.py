"""What crosses between an ingress and a replica: the records of a call, and their form on a direct connection.

A list of `TranslationRequest` goes out, one of the small records below comes back. "Busy" and "refused" are values: cheap
to send and not errors of the replica. Serve's handles pickle them. A direct connection carries one JSON array a line:

    ingress -> replica   ["hello", secret]   ["call", number, trace, requests]   ["cancel", number]
    replica -> ingress   ["answer", number, reply]   ["gone", number]: not started, ask another   ["bye"]: no new calls
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.types import FinishReason, Hypothesis, SearchOptions, Timings, Translation, TranslationRequest


@dataclass(frozen=True, slots=True)
class Translated:
    """Results in the order of the requests."""

    translations: tuple[Translation, ...]


@dataclass(frozen=True, slots=True)
class Busy:
    """The replica's queue is full; nothing was started."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine cannot serve request `index`; nothing was started. `code` as in engine.types.RequestError."""

    index: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine broke down; the replica is about to be replaced."""

    message: str


TranslateReply = Translated | Busy | Refused | Failed


@dataclass(frozen=True, slots=True)
class CallAddress:
    """Where a replica takes direct calls, and the secret that proves that Serve told so. Never logged."""

    replica_id: str
    host: str
    port: int
    secret: str


# A process that dies closes its connections at once. A machine that dies does not: after this long without a sign of life
# from its kernel (that of a process that is only slow, or frozen, still gives one) the connection counts as lost.
_DEAD_MACHINE_OPTIONS = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 5000}  # s, s, -, ms


def notice_dead_machines(connection: socket.socket) -> None:
    """Have the kernel end a connection whose other machine is gone. Both sides of a direct connection want that."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _DEAD_MACHINE_OPTIONS.items():
        if (option := getattr(socket, name, None)) is not None:  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def to_line(*message: Any) -> bytes:
    """One message; ASCII, so that any text of a user survives."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> list[Any]:
    """The message of a line. Raises ValueError."""
    message = json.loads(line)
    if not isinstance(message, list) or not message:
        raise ValueError("a message is a JSON array that begins with its kind")
    return message


def pack_requests(requests: Sequence[TranslationRequest]) -> list[Any]:
    """JSON form of a call."""
    return [
        (
            request.request_id,
            request.source_text,
            request.src_lang,
            request.tgt_lang,
            request.arrived_at_s,
            request.time_budget_s,
            _pack_search(request.search),
        )
        for request in requests
    ]


def unpack_requests(packed: Sequence[Any]) -> list[TranslationRequest]:
    """Inverse of pack_requests. Raises ValueError, TypeError or engine.types.RequestError for what it did not make."""
    return [
        TranslationRequest(request_id, text, src_lang, tgt_lang, SearchOptions(*search), arrived_at_s, budget_s)
        for request_id, text, src_lang, tgt_lang, arrived_at_s, budget_s, search in packed
    ]


def _pack_search(search: SearchOptions) -> tuple[Any, ...]:
    return (
        search.beam_size,
        search.length_penalty,
        search.early_stopping,
        search.max_target_tokens,
        search.min_target_tokens,
        search.no_repeat_ngram_size,
        search.num_hypotheses,
    )


def pack_reply(reply: TranslateReply) -> list[Any]:
    """JSON form of a reply. Request ids stay behind: translations are in the order of the requests."""
    match reply:
        case Translated(translations):
            return ["translated", [_pack_translation(translation) for translation in translations]]
        case Refused(index, code, message):
            return ["refused", index, code, message]
        case Failed(message):
            return ["failed", message]
        case Busy():
            return ["busy"]


def unpack_reply(packed: Sequence[Any], requests: Sequence[TranslationRequest]) -> TranslateReply:
    """Inverse of pack_reply; `requests` are those of the call. Raises ValueError or TypeError for what it did not make."""
    kind, *rest = packed
    if kind == "translated":
        pairs = zip(requests, rest[0], strict=True)
        return Translated(tuple(_unpack_translation(request.request_id, fields) for request, fields in pairs))
    plain: Mapping[str, type[Refused] | type[Failed] | type[Busy]] = {"refused": Refused, "failed": Failed, "busy": Busy}
    if kind not in plain:
        raise ValueError(f"unknown reply {kind!r}")
    return plain[kind](*rest)


def _pack_translation(translation: Translation) -> list[Any]:
    timings = translation.timings
    return [
        [(hypothesis.text, hypothesis.target_token_ids, hypothesis.score) for hypothesis in translation.hypotheses],
        translation.num_source_tokens,
        translation.finish_reason.value,
        (timings.queue_s, timings.encode_s, timings.decode_s),
        translation.error,
    ]


def _unpack_translation(request_id: str, fields: Sequence[Any]) -> Translation:
    hypotheses, num_source_tokens, reason, timings, error = fields
    return Translation(
        request_id=request_id,
        hypotheses=tuple(Hypothesis(text, tuple(ids), score) for text, ids, score in hypotheses),
        num_source_tokens=num_source_tokens,
        finish_reason=FinishReason(reason),
        timings=Timings(*timings),
        error=error,
    )
