"""A route with a JSON body and a JSON answer that skips FastAPI's dependency machinery, which costs as much as our own
part of the ingress. Documentation, body rules and errors stay those of an ordinary FastAPI route.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from app.errors import ServiceError

_MISSING = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}


def json_route(body_model: type[BaseModel]) -> type[APIRoute]:
    """A class of routes whose endpoint is `async (body: body_model, request, response) -> BaseModel`.

    Of the response it may set headers; fields of the answer that nobody set are left out.
    """

    class JsonRoute(APIRoute):
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            """Serve one request; exceptions go to the application's handlers."""
            if scope["method"] not in (self.methods or ()):
                await super().handle(scope, receive, send)  # answers 405
                return
            request = Request(scope, receive)
            body = await _read(request, body_model)
            response = Response(media_type="application/json")
            answer: BaseModel = await self.endpoint(body, request, response)
            response.body = answer.model_dump_json(exclude_unset=True).encode()
            response.headers["Content-Length"] = str(len(response.body))
            await response(scope, receive, send)

    return JsonRoute


async def _read(request: Request, body_model: type[BaseModel]) -> BaseModel:
    """The body, validated. Raises ServiceError, HTTPException, RequestValidationError, as FastAPI would."""
    _require_json(request)
    parsed = await _parse(request)
    if parsed is None:
        raise RequestValidationError([_MISSING])
    try:
        return body_model.model_validate(parsed, from_attributes=True)
    except ValidationError as error:
        problems: list[dict[str, Any]] = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (media_type.startswith("application/") and media_type.endswith("+json")):
        raise ServiceError(
            "unsupported_media_type", f"send the body with Content-Type: application/json, not {media_type or 'none'}"
        )


async def _parse(request: Request) -> Any:
    """What the body says; None for an empty one."""
    try:
        content = await request.body()
        return json.loads(content) if content else None
    except json.JSONDecodeError as error:
        problem = {
            "type": "json_invalid",
            "loc": ("body", error.pos),
            "msg": "JSON decode error",
            "ctx": {"error": error.msg},
        }
        raise RequestValidationError([problem]) from error
    except (HTTPException, ServiceError):  # of the body limit
        raise
    except Exception as error:
        reason = {UnicodeDecodeError: "it is not UTF-8", RecursionError: "it is nested too deep"}.get(type(error))
        raise ServiceError("invalid_json", f"the body cannot be read: {reason or 'it broke off'}") from error
