"""Texts of the built corpus -> token buffers on one device, with several BPE-dropout segmentations of each interface text.

A small corpus is seen many times; other segmentations of the same text (Provilkov et al. 2020) are its cheapest
regulariser. The `tokenizers` library draws them and cannot be seeded: a run repeats in distribution, not bit for bit.

Legend: G groups, L languages, K variants, N tokens.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer as TokenizersTokenizer
from torch import Tensor
from tqdm import tqdm

MAX_PIECES = 120
INTERFACE = "interface"
_CHUNK = 20_000


class CorpusError(ValueError):
    """A corpus that cannot be trained on; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class TextGroups:
    """Multi-way texts of one split: texts[g] maps a language code to its text; is_interface bool[G]."""

    texts: list[dict[str, str]]
    is_interface: NDArray[np.bool_]

    @classmethod
    def read(cls, path: Path, split: str) -> TextGroups:
        """Read one split of `texts.jsonl.gz`. Raises CorpusError when the file is absent or holds no such group."""
        if not path.exists():
            raise CorpusError(f"{path} does not exist; build it with `babelephant demo-corpus`")
        texts, interface = [], []
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                group = json.loads(line)
                if group["split"] == split and len(group["texts"]) >= 2:
                    texts.append(group["texts"])
                    interface.append(group["kind"] == INTERFACE)
        if not texts:
            raise CorpusError(f"{path} holds no group of split {split!r}")
        return cls(texts, np.array(interface))


@dataclass(frozen=True, slots=True)
class TokenBuffers:
    """tokens int32[N]; start, length int32[K * G, L], variant k of group g at k * G + g, length 0 where a language is
    absent; is_interface bool[G].
    """

    tokens: Tensor
    start: Tensor
    length: Tensor
    is_interface: Tensor
    languages: tuple[str, ...]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.is_interface)

    @property
    def num_variants(self) -> int:
        """K: 1 without BPE dropout."""
        return len(self.start) // self.num_groups

    def to(self, device: torch.device) -> TokenBuffers:
        """The same buffers on `device`."""
        return TokenBuffers(
            self.tokens.to(device),
            self.start.to(device),
            self.length.to(device),
            self.is_interface.to(device),
            self.languages,
        )


def encode_groups(
    groups: TextGroups, tokenizer_file: Path, languages: tuple[str, ...], *, num_variants: int = 1, bpe_dropout: float = 0.1
) -> TokenBuffers:
    """Encode all texts; variant 0 is the plain segmentation, the others (interface texts only) drop merges at random."""
    backend = TokenizersTokenizer.from_file(str(tokenizer_file))
    backend.encode_special_tokens = True
    places = [(g, column) for g, texts in enumerate(groups.texts) for column, code in enumerate(languages) if code in texts]
    rows, columns = (np.array(values) for values in zip(*places, strict=True))
    texts = [groups.texts[g][languages[column]] for g, column in places]
    shape = (len(groups.texts), len(languages))
    plain = _encode(backend, texts, "encode")
    flats, starts, lengths, begin = [], [], [], 0
    for variant in range(num_variants):
        ids = plain
        if variant:
            backend.model.dropout = bpe_dropout
            chosen = np.flatnonzero(groups.is_interface[rows])
            dropped = _encode(backend, [texts[i] for i in chosen], f"BPE dropout {variant}/{num_variants - 1}")
            ids = list(plain)
            for i, other in zip(chosen, dropped, strict=True):
                # an unlucky draw can outgrow a row: keep the plain segmentation then
                ids[i] = other if len(other) <= MAX_PIECES else plain[i]
        size = np.array([len(i) for i in ids])
        size[size > MAX_PIECES] = 0
        start, length = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        length[rows, columns] = size
        start[rows, columns] = begin + np.cumsum(size) - size
        flats.append(np.fromiter(chain.from_iterable(i for i, n in zip(ids, size, strict=True) if n), np.int32))
        starts.append(start)
        lengths.append(length)
        begin += len(flats[-1])
    return TokenBuffers(
        tokens=torch.from_numpy(np.concatenate(flats)),
        start=torch.from_numpy(np.concatenate(starts)),
        length=torch.from_numpy(np.concatenate(lengths)),
        is_interface=torch.from_numpy(groups.is_interface),
        languages=languages,
    )


def _encode(backend: TokenizersTokenizer, texts: list[str], label: str) -> list[list[int]]:
    ids: list[list[int]] = []
    for begin in tqdm(range(0, len(texts), _CHUNK), desc=label, unit="chunk", mininterval=2.0):
        chunk = [" ".join(text.split()) for text in texts[begin : begin + _CHUNK]]
        ids += [encoding.ids for encoding in backend.encode_batch_fast(chunk, add_special_tokens=False)]
    return ids
