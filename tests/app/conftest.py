"""The HTTP API in this process: the real app over real replicas whose engines are fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from app.ingress import build_api
from app.metric_recorders import IngressMetrics
from app.prometheus import MetricsRelay
from app.settings import PoolSettings, ServiceSettings
from app.translation import TranslationService
from tests.app.fakes import FakeTranslator, LocalPool, LocalReplica

SETTINGS: dict[str, Any] = {
    "pools": {
        "main": {"pairs": ["en-*", "*-en"], "engine": {"max_waiting": 64}},
        "asia": {"pairs": ["en-ja"], "engine": {"max_waiting": 64}},
    },
    "http": {
        "max_body_bytes": 20_000,
        "max_texts": 5,
        "max_chars_per_text": 200,
        "max_sentences": 8,
        "default_timeout_s": 20,
        "max_timeout_s": 30,
    },
    "default_beam_size": 3,
}


class Service:
    """An API client and what is behind it."""

    def __init__(self, settings: ServiceSettings, translators: dict[str, FakeTranslator]) -> None:
        self.settings = settings
        self.translators = translators
        self.pools = {
            name: LocalPool(LocalReplica(PoolSettings(**pool.model_dump()), translators[name]))
            for name, pool in settings.pools.items()
        }
        self.translation = TranslationService(settings, self.pools)
        relay = MetricsRelay(list)
        self.api = build_api(self.translation, IngressMetrics(), relay, echo_request_id=True)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            yield client

    def stop(self) -> None:
        for name, pool in self.pools.items():
            self.translators[name].gate.set()
            pool.replica._thread.stop(drain_s=0.05)


@pytest.fixture
def make_service() -> Iterator[Callable[..., Service]]:
    """Factory: `make_service(main=FakeTranslator(...), http={...})`."""
    made: list[Service] = []

    def make(*, http: dict[str, Any] | None = None, **translators: FakeTranslator) -> Service:
        settings = ServiceSettings.model_validate({**SETTINGS, "http": {**SETTINGS["http"], **(http or {})}})
        service = Service(settings, {name: translators.get(name, FakeTranslator()) for name in settings.pools})
        made.append(service)
        return service

    yield make
    for service in made:
        service.stop()
