"""Every error a client can get: code, HTTP status and meaning in one table, one exception that carries them.

The body of every error answer is `{"error": {"code", "message", "details"?, "request_id"}}` (app.schemas.ErrorBody).
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

_UNPROCESSABLE = HTTPStatus.UNPROCESSABLE_ENTITY
_UNAVAILABLE = HTTPStatus.SERVICE_UNAVAILABLE

# code -> (HTTP status, what it means). Clients may switch on the code; messages are for people and may change.
ERRORS: Mapping[str, tuple[HTTPStatus, str]] = {
    "invalid_json": (HTTPStatus.BAD_REQUEST, "the body is not valid JSON in UTF-8"),
    "cors_refused": (HTTPStatus.BAD_REQUEST, "this web origin may not call the API; see cors_allow_origins"),
    "not_found": (HTTPStatus.NOT_FOUND, "no such route"),
    "method_not_allowed": (HTTPStatus.METHOD_NOT_ALLOWED, "the route exists, the method does not"),
    "body_too_slow": (HTTPStatus.REQUEST_TIMEOUT, "the body took longer to arrive than the service waits"),
    "body_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the body has more bytes than the service accepts"),
    "unsupported_media_type": (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be sent as application/json"),
    "invalid_request": (_UNPROCESSABLE, "a field is missing, unknown or out of range; details lists each"),
    "invalid_option": (_UNPROCESSABLE, "search options that exclude each other or that the engine refuses"),
    "unknown_language": (_UNPROCESSABLE, "a language code that names no language"),
    "unsupported_pair": (_UNPROCESSABLE, "no pool translates this language pair; details lists the pairs"),
    "unsupported_language": (_UNPROCESSABLE, "the pool's model does not know the language; details lists its own"),
    "text_too_long": (_UNPROCESSABLE, "a text has more characters than allowed; details gives index and limit"),
    "too_many_sentences": (_UNPROCESSABLE, "all lines of all texts together are more than one request may hold"),
    "source_too_long": (_UNPROCESSABLE, "a line has more tokens than the model reads; details gives its index"),
    "empty_text": (_UNPROCESSABLE, "a line in which the tokenizer finds nothing to translate"),
    "engine_failed": (HTTPStatus.INTERNAL_SERVER_ERROR, "the engine failed while translating; trying again may help"),
    "internal": (HTTPStatus.INTERNAL_SERVER_ERROR, "a fault of the service; quote the request id when reporting it"),
    "busy": (_UNAVAILABLE, "the queue is full; try again after Retry-After seconds"),
    "pool_unavailable": (_UNAVAILABLE, "no replica of the pool answers; try again after Retry-After seconds"),
    "not_ready": (_UNAVAILABLE, "some pool does not answer yet; details says which"),
    "metrics_unavailable": (_UNAVAILABLE, "no node's metrics exporter answers"),
    "deadline_exceeded": (HTTPStatus.GATEWAY_TIMEOUT, "the time budget of the request ran out; its work was given up"),
}

# Codes for errors that the web framework raises with a status only.
_CODE_OF_STATUS: Mapping[int, str] = {
    HTTPStatus.BAD_REQUEST: "invalid_json",  # FastAPI raises 400 only for a body that it cannot parse
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "body_too_slow",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "body_too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
}


class ServiceError(Exception):
    """An answer that is not a translation. `code` is a key of ERRORS, `details` is JSON."""

    def __init__(
        self, code: str, message: str, *, details: Mapping[str, Any] | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code if code in ERRORS else "invalid_request"
        self.message = message
        self.details = details
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> int:
        """HTTP status of the code."""
        return int(ERRORS[self.code][0])

    def body(self, request_id: str) -> dict[str, Any]:
        """JSON body of the answer."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.details is not None:
            error["details"] = dict(self.details)
        return {"error": {**error, "request_id": request_id}}

    def headers(self) -> dict[str, str]:
        """Extra response headers: Retry-After in whole seconds where trying again makes sense."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def code_of_status(status: int) -> str:
    """Code for a status that came without one; statuses this service never chose count as its own fault."""
    return _CODE_OF_STATUS.get(status, "invalid_request" if 400 <= status < 500 else "internal")
