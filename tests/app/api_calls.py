"""Requests to the HTTP API in this process, and the one shape of its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from app.errors import ERRORS
from tests.app.conftest import Service

Make = Callable[..., Service]
GOOD = {"source_lang": "en", "target_lang": "de", "texts": ["good day"]}


def call(service: Service, *requests: dict[str, Any]) -> list[httpx.Response]:
    """Send requests one after another."""

    async def scenario() -> list[httpx.Response]:
        async with service.client() as client:
            return [await client.request(**request) for request in requests]

    return asyncio.run(scenario())


def translate(service: Service, **fields: Any) -> httpx.Response:
    return call(service, {"method": "POST", "url": "/v1/translate", "json": {**GOOD, **fields}})[0]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, after checking the shape and that status and code belong together."""
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) <= {"code", "message", "details", "request_id"}
    assert error["message"]
    assert error["request_id"] == response.headers["x-request-id"]
    assert response.status_code == ERRORS[error["code"]][0]
    assert response.headers["content-type"] == "application/json"
    return error
