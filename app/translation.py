"""One translate request from body to answer: languages, route, lines, options, one pool call, texts again. No HTTP."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import ServiceError
from app.pools import Pools, ReplicaStatus
from app.routing import LanguagePair, UnsupportedPairError
from app.schemas import HypothesisBody, TimingsBody, TranslateAnswer, TranslateBody, TranslationBody
from app.settings import HttpLimits, ServiceSettings
from app.text.languages import UnknownLanguageError, resolve_language
from app.text.lines import Line, join_lines, split_lines
from app.wire import Busy, Failed, Refused, TranslateReply
from engine.types import FinishReason, RequestError, SearchOptions, Translation, TranslationRequest

_SEARCH_FIELDS = ("length_penalty", "max_target_tokens", "early_stopping", "no_repeat_ngram_size", "num_hypotheses")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sentence came from: index of its text, number of its line (both from 0)."""

    text: int
    line: int


class TranslationService:
    """Routes requests to pools and shapes their answers. Every failure is a ServiceError."""

    def __init__(self, settings: ServiceSettings, pools: Pools) -> None:
        self.settings = settings
        self.pools = pools
        self._router = settings.router()
        self._model_names = {name: pool.model_name for name, pool in settings.pools.items()}  # looks at the file system
        self._languages: dict[str, tuple[str, ...]] = {}

    async def translate(self, body: TranslateBody, request_id: str) -> TranslateAnswer:
        """Translate all texts of the body with one pool call."""
        arrived_at_s = time.time()
        limits = self.settings.http
        budget_s = _budget(body, limits)
        _check_texts(body.texts, limits)
        search = self._search_options(body)
        pair = _pair(body)
        pool = self._route(pair)
        await self._check_languages(pool, pair)

        texts = [split_lines(text) for text in body.texts]
        places, sentences = _flatten(texts)
        if len(sentences) > limits.max_sentences:
            raise ServiceError(
                "too_many_sentences",
                f"the texts have {len(sentences)} lines; one request may hold {limits.max_sentences}",
                details={"limit": limits.max_sentences, "sentences": len(sentences)},
            )
        call_id = uuid.uuid4().hex  # the client chooses request ids and may repeat them; the engine needs unique ones
        requests = [
            TranslationRequest(
                request_id=f"{call_id}-{number}",
                source_text=sentence,
                src_lang=pair.src_lang,
                tgt_lang=pair.tgt_lang,
                search=search,
                arrived_at_s=arrived_at_s,
                time_budget_s=budget_s,
            )
            for number, sentence in enumerate(sentences)
        ]
        reply = await self.pools[pool].translate(requests, budget_s) if requests else None
        translations = self._translations(reply, pool, places)
        return TranslateAnswer(
            translations=_assemble(texts, translations, with_hypotheses=body.num_hypotheses is not None),
            source_lang=pair.src_lang,
            target_lang=pair.tgt_lang,
            pool=pool,
            model=self._model_names[pool],
            request_id=request_id,
        )

    async def replicas(self, pool: str) -> tuple[ReplicaStatus, ...]:
        """Replicas of a pool that answer. Raises ServiceError pool_unavailable when none does."""
        replicas = await self.pools[pool].status()
        self._languages[pool] = replicas[0].languages
        return replicas

    async def languages(self, pool: str) -> tuple[str, ...]:
        """FLORES-200 codes of the pool's model; asked once, they cannot change without a restart."""
        if pool not in self._languages:
            await self.replicas(pool)
        return self._languages[pool]

    def _search_options(self, body: TranslateBody) -> SearchOptions:
        chosen: dict[str, Any] = {name: getattr(body, name) for name in _SEARCH_FIELDS if getattr(body, name) is not None}
        try:
            return SearchOptions(beam_size=body.beam_size or self.settings.default_beam_size, **chosen)
        except RequestError as error:
            raise ServiceError(error.code, error.message) from error

    def _route(self, pair: LanguagePair) -> str:
        try:
            return self._router.route(pair)
        except UnsupportedPairError as error:
            raise ServiceError("unsupported_pair", str(error), details={"supported_pairs": list(error.supported)}) from error

    async def _check_languages(self, pool: str, pair: LanguagePair) -> None:
        known = await self.languages(pool)
        for code in (pair.src_lang, pair.tgt_lang):
            if code not in known:
                raise ServiceError(
                    "unsupported_language",
                    f"the model of pool {pool} does not know {code}; it knows {', '.join(sorted(known))}",
                    details={"language": code, "supported_languages": sorted(known)},
                )

    def _translations(self, reply: TranslateReply | None, pool: str, places: Sequence[Place]) -> tuple[Translation, ...]:
        """Finished translations in the order of the sentences, or the error that the reply stands for."""
        if reply is None:
            return ()
        if isinstance(reply, Busy):
            raise ServiceError(
                "busy",
                f"the queue of pool {pool} is full; try again later",
                retry_after_s=self.settings.http.retry_after_s,
            )
        if isinstance(reply, Failed):
            raise ServiceError("engine_failed", f"the engine of pool {pool} failed: {reply.message}")
        if isinstance(reply, Refused):
            raise self._refusal(reply, pool, places[reply.index])
        for translation in reply.translations:
            if translation.finish_reason is FinishReason.DEADLINE:
                raise ServiceError("deadline_exceeded", "the time budget of the request ran out")
            if not translation.ok:
                raise ServiceError("engine_failed", f"a sentence did not finish: {translation.error}")
        return reply.translations

    def _refusal(self, refused: Refused, pool: str, place: Place) -> ServiceError:
        details: dict[str, Any] = {"index": place.text, "line": place.line}
        if refused.code == "source_too_long":
            details["limit"] = self.settings.pools[pool].engine.max_source_tokens
        return ServiceError(refused.code, f"text {place.text}, line {place.line}: {refused.message}", details=details)


def _budget(body: TranslateBody, limits: HttpLimits) -> float:
    if body.timeout_s is None:
        return limits.default_timeout_s
    if body.timeout_s > limits.max_timeout_s:
        raise ServiceError(
            "invalid_request",
            f"timeout_s is {body.timeout_s:g}; at most {limits.max_timeout_s:g} is allowed",
            details={"limit": limits.max_timeout_s},
        )
    return body.timeout_s


def _check_texts(texts: Sequence[str], limits: HttpLimits) -> None:
    if len(texts) > limits.max_texts:
        raise ServiceError(
            "invalid_request",
            f"texts has {len(texts)} items; one request may hold {limits.max_texts}",
            details={"limit": limits.max_texts},
        )
    for index, text in enumerate(texts):
        if len(text) > limits.max_chars_per_text:
            raise ServiceError(
                "text_too_long",
                f"text {index} has {len(text)} characters; at most {limits.max_chars_per_text} are allowed",
                details={"index": index, "limit": limits.max_chars_per_text},
            )


def _pair(body: TranslateBody) -> LanguagePair:
    try:
        pair = LanguagePair(resolve_language(body.source_lang).flores, resolve_language(body.target_lang).flores)
    except UnknownLanguageError as error:
        raise ServiceError("unknown_language", str(error), details={"language": error.code}) from error
    if pair.src_lang == pair.tgt_lang:
        raise ServiceError("invalid_request", f"source_lang and target_lang are both {pair.src_lang}; choose two languages")
    return pair


def _flatten(texts: Sequence[Sequence[Line]]) -> tuple[list[Place], list[str]]:
    """All sentences of all texts in order, and where each came from."""
    places = [Place(i, j) for i, lines in enumerate(texts) for j, line in enumerate(lines) if line.sentence]
    return places, [texts[place.text][place.line].sentence for place in places]


def _assemble(
    texts: Sequence[Sequence[Line]], translations: Sequence[Translation], *, with_hypotheses: bool
) -> list[TranslationBody]:
    """Give each text its translations back; they come in the order of the sentences."""
    remaining = iter(translations)
    return [
        _text_body(lines, [next(remaining) for line in lines if line.sentence], with_hypotheses=with_hypotheses)
        for lines in texts
    ]


def _text_body(lines: Sequence[Line], parts: Sequence[Translation], *, with_hypotheses: bool) -> TranslationBody:
    if not parts:
        zero = TimingsBody(queue_ms=0, encode_ms=0, decode_ms=0)
        return TranslationBody(
            text="",
            score=None,
            source_tokens=0,
            target_tokens=0,
            finish_reason="empty",
            timings=zero,
        )
    candidates = [_candidate(lines, parts, rank) for rank in range(min(len(part.hypotheses) for part in parts))]
    body = TranslationBody(
        text=candidates[0].text,
        score=candidates[0].score,
        source_tokens=sum(part.num_source_tokens for part in parts),
        target_tokens=sum(part.num_target_tokens for part in parts),
        finish_reason="length" if any(part.finish_reason is FinishReason.LENGTH for part in parts) else "eos",
        timings=_slowest(parts),
    )
    return body.model_copy(update={"hypotheses": candidates}) if with_hypotheses else body


def _candidate(lines: Sequence[Line], parts: Sequence[Translation], rank: int) -> HypothesisBody:
    """The rank-th best of every line, joined; score averaged over lines by tokens."""
    chosen = [part.hypotheses[rank] for part in parts]
    num_tokens = [max(1, len(hypothesis.target_token_ids)) for hypothesis in chosen]
    score = sum(n * hypothesis.score for n, hypothesis in zip(num_tokens, chosen, strict=True)) / sum(num_tokens)
    return HypothesisBody(text=join_lines(lines, [hypothesis.text for hypothesis in chosen]), score=score)


def _slowest(parts: Sequence[Translation]) -> TimingsBody:
    return TimingsBody(
        queue_ms=_ms(max(part.timings.queue_s for part in parts)),
        encode_ms=_ms(max(part.timings.encode_s for part in parts)),
        decode_ms=_ms(max(part.timings.decode_s for part in parts)),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
