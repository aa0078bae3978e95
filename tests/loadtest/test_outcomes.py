"""The taxonomy of answers."""

from __future__ import annotations

import json

import pytest

from loadtest.outcomes import Outcome, classify, parse_server_timing


def body(*texts: object) -> bytes:
    return json.dumps({"translations": [{"text": text} for text in texts]}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "content", "expected"),
    [
        (200, {}, body("eins", "zwei"), (Outcome.OK, 8)),
        (200, {}, body("eins"), (Outcome.MALFORMED, 0)),
        (200, {}, body("eins", " "), (Outcome.MALFORMED, 0)),
        (200, {}, body("eins", None), (Outcome.MALFORMED, 0)),
        (200, {}, b'{"translations": 3}', (Outcome.MALFORMED, 0)),
        (200, {}, b'["translations"]', (Outcome.MALFORMED, 0)),
        (200, {}, b"<html>", (Outcome.MALFORMED, 0)),
        (200, {}, b"\xff\xfe\xfa", (Outcome.MALFORMED, 0)),
        (302, {}, b"", (Outcome.MALFORMED, 0)),
        (503, {"Retry-After": "1"}, b"", (Outcome.REFUSED, 0)),
        (503, {}, b"", (Outcome.SERVER_ERROR, 0)),
        (500, {"Retry-After": "1"}, b"", (Outcome.SERVER_ERROR, 0)),
        (504, {}, b"", (Outcome.SERVER_ERROR, 0)),
        (429, {"Retry-After": "1"}, b"", (Outcome.CLIENT_ERROR, 0)),
        (422, {}, b"", (Outcome.CLIENT_ERROR, 0)),
    ],
)
def test_classify(status, headers, content, expected):
    assert classify(status, headers, content, 2) == expected


def test_only_broken_promises_are_lost():
    lost = {outcome for outcome in Outcome if outcome.lost}
    assert lost == {Outcome.SERVER_ERROR, Outcome.TIMEOUT, Outcome.CONNECTION, Outcome.MALFORMED}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("queue;dur=1.5, total;dur=20", {"queue": 1.5, "total": 20.0}),
        ('db;desc="a b";dur=53, cache', {"db": 53.0}),
        ("", {}),
        ("nonsense", {}),
    ],
)
def test_server_timing(header, expected):
    assert parse_server_timing(header) == expected
