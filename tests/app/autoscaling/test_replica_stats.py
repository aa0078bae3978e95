"""The real replica reports what the policy reads: everything offered, refused sentences included, and since when."""

from __future__ import annotations

import asyncio
import time

from app.autoscaling.feed import OFFERED, UPTIME, WAITING
from app.settings import PoolSettings, PoolTuning
from app.wire import Busy, Translated
from engine.types import TranslationRequest
from tests.app.fakes import FakeTranslator, LocalReplica


def sentences(count: int, call: str) -> list[TranslationRequest]:
    return [TranslationRequest(f"{call}-{i}", "word", "eng_Latn", "deu_Latn") for i in range(count)]


def test_offered_sentences_count_whether_answered_or_refused() -> None:
    before_s = time.monotonic()
    replica = LocalReplica(PoolSettings(), FakeTranslator())
    after_s = time.monotonic()
    asyncio.run(replica.reconfigure(PoolTuning(max_pending=5).model_dump(exclude_none=True)))
    assert replica.record_autoscaling_stats()[OFFERED] == 0.0
    assert isinstance(asyncio.run(replica.translate(sentences(3, "a"))), Translated)
    assert isinstance(asyncio.run(replica.translate(sentences(6, "b"))), Busy)
    asked_s = time.monotonic()
    stats = replica.record_autoscaling_stats()
    assert asked_s - after_s <= stats[UPTIME] <= time.monotonic() - before_s  # since it was ready
    assert stats[OFFERED] == 9.0
    assert stats[WAITING] == 0.0
    assert all(isinstance(value, float) for value in stats.values())  # Serve drops all of them for one of another type
    assert {name: value for name, value in stats.items() if name.startswith("pair ")} == {
        "pair eng_Latn-deu_Latn offered_sentences": 9.0,
        "pair eng_Latn-deu_Latn offered_chars": 9.0 * len("word"),
        "pair eng_Latn-deu_Latn finished_chars": 3.0 * len("word"),
        "pair eng_Latn-deu_Latn source_tokens": 3.0 * 3,
        "pair eng_Latn-deu_Latn target_tokens": 3.0 * 3,
    }
    replica._thread.stop(drain_s=0.1)
