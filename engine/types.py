"""The types that flow through the engine. Torch-free, picklable; host arrays are numpy int32."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
EarlyStopping = bool | Literal["never"]


class RequestError(ValueError):
    """A request this engine cannot serve (unknown language, too long, bad option): the caller's to fix.

    `code` is a stable machine word (`unsupported_language`, `source_too_long`, `invalid_option`, `empty_text`).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str]]:
        return type(self), (self.code, self.message)


class EngineFullError(RuntimeError):
    """The waiting queue is at `max_waiting`: try again later or elsewhere."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What beam search is asked to do; names and meaning as in transformers' generate().

    max_target_tokens counts generated tokens with the forced language tag and eos, without the decoder start token
    (= max_new_tokens), so at least 2 (the tag and one more); None means the engine's limit. min_target_tokens likewise
    (= min_new_tokens).
    beam_size 1 is greedy search.
    """

    beam_size: int = 4
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    max_target_tokens: int | None = None
    min_target_tokens: int = 0
    no_repeat_ngram_size: int = 0
    num_hypotheses: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.beam_size <= 8:
            raise RequestError("invalid_option", f"beam_size is {self.beam_size}; choose 1 to 8")
        if not 1 <= self.num_hypotheses <= self.beam_size:
            raise RequestError(
                "invalid_option", f"num_hypotheses is {self.num_hypotheses}; choose 1 to beam_size ({self.beam_size})"
            )
        if not -10.0 <= self.length_penalty <= 10.0:  # refuses NaN too
            raise RequestError("invalid_option", f"length_penalty is {self.length_penalty}; choose -10 to 10")
        if self.early_stopping not in (True, False, "never"):
            raise RequestError("invalid_option", f"early_stopping is {self.early_stopping!r}; choose true, false or never")
        if self.max_target_tokens is not None and self.max_target_tokens < 1:
            raise RequestError("invalid_option", f"max_target_tokens is {self.max_target_tokens}; it must be at least 1")
        if self.min_target_tokens < 0 or self.no_repeat_ngram_size < 0:
            raise RequestError("invalid_option", "min_target_tokens and no_repeat_ngram_size cannot be negative")


@dataclass(frozen=True, slots=True)
class TranslationRequest:
    """One sentence to translate; a list of these is all that crosses from the ingress to a replica.

    src_lang, tgt_lang: FLORES-200 codes (`eng_Latn`). arrived_at_s: epoch seconds, 0 means now. time_budget_s: seconds from
    arrival after which nobody waits for the answer any more (each process turns it into its own monotonic deadline); None:
    no limit.
    """

    request_id: str
    source_text: str
    src_lang: str
    tgt_lang: str
    search: SearchOptions = field(default_factory=SearchOptions)
    arrived_at_s: float = 0.0
    time_budget_s: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Sentences packed for one encoder pass, no padding. S_total tokens, B sentences.

    source_token_ids int32[S_total], source_offsets int32[B+1], source_slots int32[B].
    """

    source_token_ids: Int32Array
    source_offsets: Int32Array
    source_slots: Int32Array


class FinishReason(enum.StrEnum):
    """Why a sentence left the engine."""

    EOS = "eos"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds one sentence spent waiting, in its encoder pass, and in decode steps."""

    queue_s: float
    encode_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One finished output: ids as generated (forced language tag first, eos last if reached), score after length penalty."""

    text: str
    target_token_ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Translation:
    """Result for one request, best hypothesis first in `hypotheses`.

    finish_reason CANCELLED, DEADLINE or ERROR: `hypotheses` is empty and `error` says why.
    """

    request_id: str
    hypotheses: tuple[Hypothesis, ...]
    num_source_tokens: int
    finish_reason: FinishReason
    timings: Timings
    error: str | None = None

    @property
    def ok(self) -> bool:
        """True when there is a text."""
        return bool(self.hypotheses)

    @property
    def text(self) -> str:
        """Best text; raises IndexError when the sentence did not finish."""
        return self.hypotheses[0].text

    @property
    def score(self) -> float:
        """Score of the best hypothesis: log-probability sum / num_target_tokens ** length_penalty, in greedy search too."""
        return self.hypotheses[0].score

    @property
    def num_target_tokens(self) -> int:
        """Generated tokens of the best hypothesis, language tag and eos included; 0 without one."""
        return len(self.hypotheses[0].target_token_ids) if self.hypotheses else 0


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How the tokens of one stage spread over the experts, in the passes that were looked at since the start.

    layers: places of the sparse layers in their stack; the other tuples have an entry for each. num_tokens: (token, expert)
    pairs; num_active: experts with at least one token, added up over passes. skew: tokens of the busiest expert over those
    of the mean one (1: even); busiest_share: over those of all. Both are of the recent past: the last 64 to 128 tokens
    an expert, as with fewer even a uniform router looks skewed.
    """

    stage: Literal["encode", "decode"]
    layers: tuple[int, ...]
    num_passes: int
    num_tokens: tuple[int, ...]
    num_active: tuple[int, ...]
    skew: tuple[float, ...]
    busiest_share: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds right now: counts for metrics and admission.

    num_decoded_rows: live rows of all decode steps; over num_decode_steps it is the mean batch.
    num_retries: sentences put back after a fault in work they shared, since the start. num_faults_in_a_row: sentences that
    failed by themselves since the last one that finished. expert_loads: of each stage that has sparse layers and has run.
    """

    num_waiting: int
    num_running: int
    num_live_rows: int
    max_rows: int
    max_waiting: int
    num_encode_passes: int
    num_decode_steps: int
    num_decoded_rows: int = 0
    num_retries: int = 0
    num_faults_in_a_row: int = 0
    expert_loads: tuple[ExpertLoad, ...] = ()
