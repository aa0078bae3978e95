"""What pydantic found wrong, field by field, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

# What pydantic says in the words of its own types.
_WORDS: Mapping[str, str] = {
    "extra_forbidden": "unknown field",
    "missing": "missing",
    "model_type": "must be an object with named fields",
    "model_attributes_type": "must be an object with named fields",
    "dict_type": "must be an object with named fields",
}


def problem(error: Mapping[str, Any]) -> str:
    """What is wrong with one field, for people. `error`: one of `ValidationError.errors()`."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]) if "error" in error.get("ctx", {}) else str(error["msg"])
    return _WORDS.get(error["type"], error["msg"])


def field(location: Sequence[int | str]) -> str:
    """`pools.demo.precision` for its path."""
    return ".".join(map(str, location))


def invalid_fields(error: ValidationError) -> str:
    """`field: problem; field: problem`, without pydantic's input dumps and links."""
    return "; ".join(": ".join(filter(None, (field(found["loc"]), problem(found)))) for found in error.errors())
