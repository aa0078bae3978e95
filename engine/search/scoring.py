"""Scores: log-probabilities, the best tokens of a row, length penalty.

Legend: R rows, V vocabulary, B sentences, C chunks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = -1.0e9  # score of what must never win, as in transformers; finite, so that sums stay comparable
_CHUNK = 64  # tokens a chunk; one amax over chunks replaces a selection over the vocabulary
_MIN_CHUNKS = 32  # below this a direct selection is as fast


def log_softmax_(logits: Tensor) -> Tensor:
    """log-softmax of every row, in the same memory: float32[R, V] -> [R, V]. A row with NaN or +inf becomes all NaN.

    The kernels read a row to the end before they write it, element by element; a second [R, V] buffer would be 1 MB a row
    at the vocabulary of the published model.
    """
    return torch.log_softmax(logits, -1, out=logits)


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best tokens of every row, best first: float32[R, V] -> (values [R, k], token ids [R, k]).

    Two stages: the k chunks with the largest maxima hold the k largest values. Equal values come in any order.
    """
    vocab_size = logits.shape[-1]
    chunks = _chunks(logits)
    num_chunks = chunks.shape[1]
    if num_chunks < max(_MIN_CHUNKS, 2 * k):
        values, token_ids = logits.topk(min(k, vocab_size))
        return values, token_ids
    best_chunks = chunks.amax(-1).topk(k).indices
    ids = torch.arange(vocab_size, device=logits.device)
    columns = ids[:_CHUNK] + best_chunks.unsqueeze(-1) * _CHUNK
    candidates = torch.cat([columns.flatten(1), ids[num_chunks * _CHUNK :].expand(len(logits), -1)], 1)
    values, picked = logits.gather(1, candidates).topk(k)
    return values, candidates.gather(1, picked)


def best_token(logits: Tensor) -> Tensor:
    """argmax of every row, the lowest id on ties: float32[R, V] -> int64[R]. Two stages: torch's argmax is slow on CPUs."""
    chunks = _chunks(logits)
    if chunks.shape[1] < _MIN_CHUNKS:
        return logits.argmax(-1)
    best_chunk = chunks.amax(-1).argmax(-1)
    best = chunks[torch.arange(len(chunks), device=logits.device), best_chunk].argmax(-1) + best_chunk * _CHUNK
    tail_start = chunks.shape[1] * _CHUNK
    if tail_start == logits.shape[1]:
        return best
    in_tail = logits[:, tail_start:].argmax(-1) + tail_start
    return torch.where(_at(logits, in_tail) > _at(logits, best), in_tail, best)


def _chunks(logits: Tensor) -> Tensor:
    """View [R, C, 64] of all but the ragged end of the rows."""
    num_chunks = logits.shape[1] // _CHUNK
    return logits[:, : num_chunks * _CHUNK].view(len(logits), num_chunks, _CHUNK)


def _at(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.gather(1, token_ids[:, None])[:, 0]


def length_normalizer(num_tokens: Tensor, length_penalty: Tensor) -> Tensor:
    """num_tokens ** length_penalty as float32[B], computed in float64: score = cum_logprob / this.

    num_tokens counts generated tokens, the forced language token and eos included, the decoder start token not.
    """
    return (num_tokens.double() ** length_penalty).float()
