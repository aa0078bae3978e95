"""Text <-> token ids in the NLLB format: [src_lang] + pieces + [eos]. Torch-free.

The text of a user never becomes a control token: special tokens and language codes that occur in it ("</s>", "fra_Latn")
are split into ordinary pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as TokenizersTokenizer

from engine.types import Int32Array, RequestError

_LANGUAGE_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_FILES_NEEDED = "tokenizer.json and tokenizer_config.json, as transformers 4 saves them"


class TokenizerError(ValueError):
    """Tokenizer files that cannot be used; the message names the file and what is wrong with it."""


class Tokenizer:
    """One checkpoint's tokenizer. Ids equal those of transformers' AutoTokenizer on text without special tokens in it.

    eos_token_id: the last id of every encoded text.
    """

    def __init__(self, backend: TokenizersTokenizer, *, eos_token: str = "</s>") -> None:
        eos_token_id = backend.token_to_id(eos_token)
        if eos_token_id is None:
            raise TokenizerError(f"tokenizer.json has no {eos_token!r}")
        added = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        self._language_ids: dict[str, int] = {
            code: token_id for code, token_id in added.items() if _LANGUAGE_CODE.fullmatch(code)
        }
        if not self._language_ids:
            raise TokenizerError("tokenizer.json holds no language code (such as eng_Latn) among its added_tokens")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that looks like a special token is text
        self._backend = backend
        self.eos_token_id: int = eos_token_id
        self._control_ids = frozenset(added.values())
        self._num_ids: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> Self:
        """Read `checkpoint/tokenizer.json` and `tokenizer_config.json`. Raises TokenizerError."""
        config = _read_json(checkpoint / "tokenizer_config.json")
        if config.get("legacy_behaviour"):
            raise TokenizerError(
                "tokenizer_config.json: legacy_behaviour is true (pieces + [eos, language]); set it to false, "
                "the published models are used with [language] + pieces + [eos]"
            )
        raw = _read_json(checkpoint / "tokenizer.json")
        for token in raw.get("added_tokens", []):
            token["special"] = True  # else `encode_special_tokens` would not cover it
        try:
            backend = TokenizersTokenizer.from_str(json.dumps(raw))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise TokenizerError(f"{checkpoint / 'tokenizer.json'} is not a tokenizer: {error}") from error
        eos_token = config.get("eos_token", "</s>")
        return cls(backend, eos_token=eos_token["content"] if isinstance(eos_token, dict) else eos_token)

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes in order of their ids."""
        return tuple(sorted(self._language_ids, key=self._language_ids.__getitem__))

    @property
    def num_ids(self) -> int:
        """Largest id + 1: the embedding needs at least this many rows."""
        return self._num_ids

    def language_id(self, code: str) -> int:
        """Token id of a language code. Raises RequestError(unsupported_language)."""
        try:
            return self._language_ids[code]
        except KeyError:
            raise RequestError("unsupported_language", self._unknown_language(code)) from None

    def encode(self, text: str, src_lang: str) -> Int32Array:
        """int32 ids [src_lang] + pieces + [eos]. Runs of white space count as one space, at the ends as none.

        Raises RequestError: unsupported_language, or empty_text when nothing but white space is there.
        """
        language_id = self.language_id(src_lang)
        pieces = self._backend.encode(" ".join(text.split()), add_special_tokens=False).ids
        if not pieces:
            raise RequestError("empty_text", "the source text is empty or white space; send at least one visible character")
        return np.array([language_id, *pieces, self.eos_token_id], dtype=np.int32)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of generated ids, without special tokens, language codes, and ids that no token has."""
        pieces = [i for i in token_ids if i not in self._control_ids and 0 <= i < self._num_ids]
        text: str = self._backend.decode(pieces, skip_special_tokens=False)
        return text.strip()

    def _unknown_language(self, code: str) -> str:
        close = [known for known in self.languages if known[:3].lower() == code[:3].lower()]
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(self.languages)}"
        return f"this model does not know the language {code!r}; {hint}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TokenizerError(f"{path} does not exist; a checkpoint needs {_FILES_NEEDED}") from None
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path} does not hold a JSON object")
    return raw
