"""A tokenizer of a few dozen pieces in the NLLB format, for tiny random checkpoints; transformers loads it too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

TINY_LANGUAGES = ("eng_Latn", "fra_Latn", "deu_Latn")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MERGES = [tuple(pair.split()) for pair in ("▁ t", "h e", "▁t he", "i n", "a n", "e r", "o n", "▁ a", "s t", "e n")]


def write_tiny_tokenizer(directory: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json, 45 ids in all, into `directory` and return it."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *_LETTERS, *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, _MERGES, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", *TINY_LANGUAGES, "<mask>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "NllbTokenizerFast", "additional_special_tokens": list(TINY_LANGUAGES)}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def random_texts(count: int, *, seed: int, max_words: int = 6) -> list[str]:
    """Made-up lower-case texts of 1 to max_words words."""
    rng = np.random.default_rng(seed)

    def word() -> str:
        return "".join(rng.choice(list(_LETTERS), size=int(rng.integers(1, 6))))

    return [" ".join(word() for _ in range(int(rng.integers(1, max_words + 1)))) for _ in range(count)]
