"""Text in, text out: the engine's front door. One thread calls it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tqdm import tqdm

from engine.batching import pack
from engine.config import ConfigError, EngineConfig, ModelConfig
from engine.device_memory import is_out_of_memory, release_cached_memory
from engine.device_runner import DeviceRunner, load_runner
from engine.runner import Runner
from engine.scheduler import GenerationState, Scheduler
from engine.search.spec import SearchOutcome, SearchSpec
from engine.tokenizer import Tokenizer
from engine.types import (
    EngineStats,
    FinishReason,
    Hypothesis,
    RequestError,
    SearchOptions,
    Translation,
    TranslationRequest,
)

_logger = logging.getLogger(__name__)
_WITHDRAWN = {FinishReason.CANCELLED: "the request was cancelled", FinishReason.DEADLINE: "time_budget_s ran out"}
DEFAULT_SEARCH = SearchOptions()


class Translator:
    """submit() sentences, step() until they come back; or translate() a list and wait. Not thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, scheduler: Scheduler, runner: Runner | DeviceRunner, engine_config: EngineConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._runner = runner
        self._config = engine_config
        self._num_encode_passes = 0
        self._num_decode_steps = 0
        self._num_decoded_rows = 0
        self._num_retries = 0
        self._num_faults_in_a_row = 0

    @classmethod
    def load(cls, checkpoint: Path, engine_config: EngineConfig) -> Self:
        """Load tokenizer and weights of `checkpoint` (a directory).

        Raises ConfigError (also when tokenizer and weights do not belong together), TokenizerError, or a weight error.
        """
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        model_config = ModelConfig.from_checkpoint(checkpoint)
        if tokenizer.num_ids > model_config.vocab_size or tokenizer.eos_token_id != model_config.eos_token_id:
            raise ConfigError(
                f"tokenizer.json has {tokenizer.num_ids} ids and eos {tokenizer.eos_token_id}, config.json vocab_size "
                f"{model_config.vocab_size} and eos {model_config.eos_token_id}: they are not of the same model"
            )
        return cls(tokenizer, Scheduler(engine_config), load_runner(checkpoint, engine_config), engine_config)

    @property
    def languages(self) -> tuple[str, ...]:
        """FLORES-200 codes this model's tokenizer knows."""
        return self._tokenizer.languages

    @property
    def has_work(self) -> bool:
        """True while a submitted sentence has not come back from step()."""
        return bool(self._scheduler.num_waiting or self._scheduler.num_running)

    def stats(self) -> EngineStats:
        """Counts of this moment, and passes and steps since the start."""
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_live_rows=self._scheduler.num_live_rows,
            max_rows=self._config.max_rows,
            max_waiting=self._config.max_waiting,
            num_encode_passes=self._num_encode_passes,
            num_decode_steps=self._num_decode_steps,
            num_decoded_rows=self._num_decoded_rows,
            num_retries=self._num_retries,
            num_faults_in_a_row=self._num_faults_in_a_row,
            expert_loads=self._runner.expert_loads,
        )

    def submit(self, request: TranslationRequest) -> None:
        """Queue one sentence. Raises RequestError (unsupported_language, source_too_long, empty_text, invalid_option) or
        EngineFullError; then nothing was queued.
        """
        self._scheduler.submit(self._prepare(request))

    def cancel(self, request_id: str) -> bool:
        """The next step() returns it as CANCELLED, unless it is not in the engine (False)."""
        return self._scheduler.cancel(request_id)

    def step(self) -> list[Translation]:
        """Withdraw, admit, decode one token for every live row. Returns the sentences that ended, in any way, just now."""
        ended = self._withdraw()
        ended += self._admit()
        ended += self._decode()
        return ended

    def translate(
        self,
        texts: Sequence[str],
        *,
        src_lang: str,
        tgt_lang: str,
        search: SearchOptions = DEFAULT_SEARCH,
        progress: bool = False,
    ) -> list[Translation]:
        """Translate a list of any length; results in the order of `texts`, ERROR results among them where a step failed.

        Raises RequestError, naming the place in `texts`, before any work; RuntimeError while submitted sentences are in the
        engine, whose results would be lost.
        """
        if self.has_work:
            raise RuntimeError("translate() needs an idle engine: step() until has_work is False first")
        states = []
        for i, text in enumerate(texts):
            try:
                states.append(self._prepare(TranslationRequest(str(i), text, src_lang, tgt_lang, search)))
            except RequestError as error:
                raise RequestError(error.code, f"texts[{i}]: {error.message}") from None
        try:
            return self._run(states, progress=progress)
        finally:
            self._abandon()  # only an interrupted run leaves anything

    def _run(self, states: Sequence[GenerationState], *, progress: bool) -> list[Translation]:
        translations: dict[str, Translation] = {}
        longest_last = sorted(states, key=lambda state: len(state.source_token_ids))  # popped from the end
        with tqdm(total=len(states), disable=not progress, unit="sentence") as bar:
            while longest_last or self.has_work:
                while longest_last and self._scheduler.num_waiting < self._config.max_waiting:
                    self._scheduler.submit(longest_last.pop())
                ended = self.step()
                translations.update((translation.request_id, translation) for translation in ended)
                bar.update(len(ended))
        return [translations[state.request.request_id] for state in states]

    def _abandon(self) -> None:
        for request_id in self._scheduler.request_ids():
            self.cancel(request_id)
        self._withdraw()

    def _prepare(self, request: TranslationRequest) -> GenerationState:
        forced_token_id = self._tokenizer.language_id(request.tgt_lang)
        source_token_ids = self._tokenizer.encode(request.source_text, request.src_lang)
        state = GenerationState(request, source_token_ids, forced_token_id, self._max_tokens(request.search))
        self._scheduler.check(state)
        return state

    def _max_tokens(self, search: SearchOptions) -> int:
        limit = self._config.max_target_tokens
        max_tokens = limit if search.max_target_tokens is None else search.max_target_tokens
        if not 2 <= max_tokens <= limit:  # the language tag is the first
            raise RequestError("invalid_option", f"max_target_tokens is {max_tokens}; this engine takes 2 to {limit}")
        if search.min_target_tokens > max_tokens:
            message = f"min_target_tokens is {search.min_target_tokens}; max_target_tokens is {max_tokens}, lower it"
            raise RequestError("invalid_option", message)
        return max_tokens

    def _withdraw(self) -> list[Translation]:
        withdrawn = self._scheduler.withdraw()
        if not withdrawn:
            return []
        ended = [_without_text(state, reason, _WITHDRAWN[reason]) for state, reason in withdrawn]
        try:
            self._runner.remove({state.source_slot for state, _ in withdrawn})
        except Exception as error:
            ended += self._retry_running(error)
        return ended

    def _admit(self) -> list[Translation]:
        admitted = self._scheduler.admit()
        if not admitted:
            return []
        encoded, ended = self._encode(admitted)
        if encoded:
            self._scheduler.mark_encoded(encoded)
            try:
                self._runner.start([_search_spec(state) for state in encoded])
            except Exception as error:
                ended += self._retry_running(error)
        return ended

    def _encode(self, states: Sequence[GenerationState]) -> tuple[list[GenerationState], list[Translation]]:
        """Returns those that are encoded and those that failed. A pass too large for the memory is split."""
        self._num_encode_passes += 1
        try:
            self._runner.encode(pack([s.source_token_ids for s in states], [s.source_slot for s in states]))
        except Exception as error:
            if not is_out_of_memory(error):
                return [], self._retry(states, error)
            if len(states) == 1:
                return [], self._fail(states[0], error)
            _logger.warning("no memory for an encoder pass of %d sentences: it is split in two", len(states))
        else:
            return list(states), []
        release_cached_memory()  # after the except block: the error's traceback keeps the tensors of the failed pass
        half = len(states) // 2
        encoded, ended = self._encode(states[:half])
        more_encoded, more_ended = self._encode(states[half:])
        return encoded + more_encoded, ended + more_ended

    def _decode(self) -> list[Translation]:
        if not self._scheduler.num_running:
            return []
        self._num_decode_steps += 1
        self._num_decoded_rows += self._scheduler.num_live_rows
        try:
            outcomes = self._runner.decode()
        except Exception as error:
            return self._retry_running(error)
        return [self._translation(self._scheduler.finish(outcome.source_slot), outcome) for outcome in outcomes]

    def _retry_running(self, error: Exception) -> list[Translation]:
        """A fault in work that all running sentences share; those that wait go on."""
        self._runner.clear()
        return self._retry(self._scheduler.running(), error)

    def _retry(self, states: Sequence[GenerationState], error: Exception) -> list[Translation]:
        """Start over in smaller groups: only a sentence that breaks its work alone, when it is a suspect already, fails.

        A group of n is tried again in groups of n / 2, so each sentence at most log2(n) + 1 times.
        """
        if len(states) == 1 and states[0].is_suspect:
            return self._fail(states[0], error)
        _logger.warning("a fault hit %d sentences, which start over", len(states), exc_info=error)
        self._num_retries += len(states)
        self._scheduler.put_back(states)
        if is_out_of_memory(error):
            release_cached_memory()
        return []

    def _fail(self, state: GenerationState, error: Exception) -> list[Translation]:
        _logger.error("sentence %s failed", state.request.request_id, exc_info=error)
        self._num_faults_in_a_row += 1
        reason = f"{type(error).__name__}: {error}"
        return [_without_text(self._scheduler.finish(state.source_slot), FinishReason.ERROR, reason)]

    def _translation(self, state: GenerationState, outcome: SearchOutcome) -> Translation:
        if outcome.failure is not None:
            return _without_text(state, FinishReason.ERROR, outcome.failure)
        self._num_faults_in_a_row = 0
        try:
            hypotheses = tuple(
                Hypothesis(self._tokenizer.decode(hypothesis.token_ids), hypothesis.token_ids, hypothesis.score)
                for hypothesis in outcome.hypotheses
            )
        except Exception as error:
            _logger.error("the tokens of %s could not be decoded", state.request.request_id, exc_info=error)
            return _without_text(state, FinishReason.ERROR, f"{type(error).__name__}: {error}")
        ends = hypotheses[0].target_token_ids[-1] == self._tokenizer.eos_token_id
        reason = FinishReason.EOS if ends else FinishReason.LENGTH
        return Translation(state.request.request_id, hypotheses, len(state.source_token_ids), reason, state.timings)


def _search_spec(state: GenerationState) -> SearchSpec:
    return SearchSpec(
        source_slot=state.source_slot,
        beam_rows=state.beam_rows,
        forced_token_id=state.forced_token_id,
        max_tokens=state.max_tokens,
        options=state.request.search,
    )


def _without_text(state: GenerationState, reason: FinishReason, error: str) -> Translation:
    return Translation(state.request.request_id, (), len(state.source_token_ids), reason, state.timings, error)
