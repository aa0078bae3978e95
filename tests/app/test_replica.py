"""The replica outside Serve: tuning in place, load figures, health, what it records."""

from __future__ import annotations

import asyncio
import gc

import pytest
from pydantic import ValidationError

from app.engine_thread import EngineDeadError
from app.replica import Replica
from app.settings import PoolSettings
from app.wire import Busy, Failed, Refused, Translated
from engine.config import EngineConfig
from engine.types import TranslationRequest
from tests.app.fakes import LANGUAGES, FakeTranslator, LocalReplica


def request(text: str, name: str = "r") -> TranslationRequest:
    return TranslationRequest(name, text, "eng_Latn", "deu_Latn")


def replica(engine: FakeTranslator | None = None) -> LocalReplica:
    return LocalReplica(PoolSettings(), engine or FakeTranslator())


def test_answers_are_values() -> None:
    async def scenario() -> None:
        ours = replica()
        assert isinstance(await ours.translate([request("a")]), Translated)
        refused = await ours.translate([request("a"), request("w " * 21, "s")])
        assert refused == Refused(1, "source_too_long", "more than 20 tokens")
        assert await ours.translate([request("a", str(i)) for i in range(9)]) == Busy()

    asyncio.run(scenario())


def test_dead_engine_fails_health_and_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("app.replica._EXIT_DELAY_S", 0.0)
    monkeypatch.setattr("os._exit", exits.append)

    async def scenario() -> None:
        ours = replica()
        ours.check_health()
        assert await ours.translate([request("boom")]) == Failed("the engine failed: device lost")
        with pytest.raises(EngineDeadError):
            ours.check_health()
        with pytest.raises(EngineDeadError):
            await ours.status()
        async with asyncio.timeout(60):
            while not exits:
                await asyncio.sleep(0.005)

    asyncio.run(scenario())
    assert exits == [1]


def test_reconfigure_is_idempotent_and_strict() -> None:
    async def scenario() -> None:
        ours = replica()
        default = ours._thread.max_pending
        for _ in range(2):
            await ours.reconfigure({"max_pending": 2, "stuck_after_s": 5})
        assert await ours.translate([request("a", str(i)) for i in range(3)]) == Busy()
        await ours.reconfigure({})
        assert ours._thread.max_pending == default
        with pytest.raises(ValidationError):
            await ours.reconfigure({"max_pendign": 2})

    asyncio.run(scenario())


def test_load_figures_are_numbers_and_the_rate_counts_since_the_last_call() -> None:
    async def scenario() -> None:
        ours = replica()
        await ours.translate([request("a b c")])
        first, second = ours.record_autoscaling_stats(), ours.record_autoscaling_stats()
        assert all(type(value) is float for value in first.values())
        assert first["target_tokens_per_s"] > 0
        assert second["target_tokens_per_s"] == 0
        assert (await ours.status()).languages == LANGUAGES

    asyncio.run(scenario())


def test_graceful_stop_finishes_what_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.replica._EXIT_DELAY_S", 0.0)

    async def scenario() -> None:
        ours = replica(FakeTranslator(step_s=0.01))
        task = asyncio.create_task(ours.translate([request("a b c d e")]))
        await asyncio.sleep(0.02)
        await ours.stopped_by_serve()
        reply = await task
        assert isinstance(reply, Translated)
        assert reply.translations[0].text == "A B C D E"
        assert isinstance(await ours.translate([request("late comer")]), Failed)

    asyncio.run(scenario())


def test_what_is_loaded_is_left_out_of_full_collections() -> None:
    """Of the objects that the collector watched after loading, nearly all were there before: imports and the engine."""
    settings = PoolSettings()
    assert gc.get_freeze_count() == 0
    try:
        engine = Replica.func_or_class._load(replica(), settings.checkpoint_path(), EngineConfig())
        watched = gc.get_objects()
        assert gc.get_freeze_count() > 10 * len(watched)
        assert not any(one is engine for one in watched)
    finally:
        gc.unfreeze()
    assert any(one is engine for one in gc.get_objects())
