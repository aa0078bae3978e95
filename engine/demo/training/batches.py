"""Training batches built wholly on the device from flat token buffers.

A batch is `num_rows` rows of ROW_LENGTH positions. Every row holds k = ROW_LENGTH // s sentence pairs in k slots of one
slot size s, source and target side by side in the same slot, so each batch has one fixed shape (one captured CUDA graph)
and little padding. Attention masks keep the slots apart.

Legend: G groups, L languages, N tokens, P pairs in the pool, B rows of a batch, W = ROW_LENGTH.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.demo.training.encoding import CorpusError, TokenBuffers

ROW_LENGTH = 128
SLOT_SIZES = (4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 21, 25, 32, 42, 64, 128)
IGNORED_LABEL = -100
_TAGS_PER_SENTENCE = 2  # source: language tag and eos; target: decoder start and language tag


@dataclass(frozen=True, slots=True)
class Batch:
    """source_ids, target_ids int64[B, W]; labels int64[B, W] (IGNORED_LABEL where there is nothing to predict);
    positions int64[B, W] from 0 inside each slot; source_valid bool[B, W]; source_mask, target_mask, cross_mask
    bool[B, 1, W, W], True = may attend.
    """

    source_ids: Tensor
    target_ids: Tensor
    labels: Tensor
    positions: Tensor
    source_valid: Tensor
    source_mask: Tensor
    target_mask: Tensor
    cross_mask: Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How pairs are drawn: group first (CLDR phrases with probability `cldr_share`, inside each kind in proportion to a
    group's number of languages), then two of its languages, `pivot` being `pivot_weight` times as likely as another one.
    """

    cldr_share: float
    pivot: str = "eng_Latn"
    pivot_weight: float = 4.0
    plain_share: float = 0.5  # of draws that take the plain segmentation where several variants exist


class PairPool:
    """Sentence pairs drawn at random, sorted by length and cut into rows; refilled in place when used up."""

    def __init__(
        self,
        buffers: TokenBuffers,
        language_ids: Tensor,
        sampling: Sampling,
        *,
        num_pairs: int,
        pad_id: int,
        eos_id: int,
        generator: torch.Generator,
    ) -> None:
        self.buffers, self.language_ids, self.sampling, self.num_pairs = buffers, language_ids, sampling, num_pairs
        self.pad_id, self.eos_id, self._generator = pad_id, eos_id, generator
        device = buffers.tokens.device
        self._present = buffers.length[: buffers.num_groups] > 0
        self._group_cdf = self._cumulative_weight()
        self._language_weight = torch.ones(len(buffers.languages), device=device)
        self._language_weight[buffers.languages.index(sampling.pivot)] = sampling.pivot_weight
        self._slot_sizes = torch.tensor(SLOT_SIZES, device=device)
        storage = torch.zeros(6, num_pairs, dtype=torch.int64, device=device)
        self.source_index, self.target_index, self.source_lang, self.target_lang, self.row_first, self.row_slot_size = (
            storage
        )
        self.row_slot_size.fill_(ROW_LENGTH)
        self.num_rows = 0
        self.refill()

    def _cumulative_weight(self) -> Tensor:
        num_languages = self._present.sum(1)
        weight = torch.zeros(len(num_languages), dtype=torch.float64, device=num_languages.device)
        share = self.sampling.cldr_share
        for members, part in ((self.buffers.is_interface, 1.0 - share), (~self.buffers.is_interface, share)):
            chosen = members & (num_languages >= 2)
            total = float(num_languages[chosen].sum())
            if total:
                weight[chosen] = num_languages[chosen].double() * (part / total)
        if float(weight.sum()) <= 0:
            raise CorpusError("no group holds two languages: nothing to train on")
        return torch.cumsum(weight / weight.sum(), 0)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of start/length for source and target, and the two language columns, int64[P] each."""
        buffers, generator, num = self.buffers, self._generator, self.num_pairs
        device = buffers.tokens.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, device=device, dtype=torch.float64, generator=generator)

        group = torch.searchsorted(self._group_cdf, uniform(num)).clamp_(max=buffers.num_groups - 1)
        # the two largest Gumbel-perturbed log-weights are a draw of two languages without replacement
        gumbel = -torch.log(-torch.log(uniform(num, len(buffers.languages)).clamp_(1e-12, 1 - 1e-12)))
        keys = (torch.log(self._language_weight) + gumbel).masked_fill(~self._present[group], float("-inf"))
        two = keys.topk(2, dim=1).indices
        swap = uniform(num) < 0.5
        source, target = torch.where(swap, two[:, 1], two[:, 0]), torch.where(swap, two[:, 0], two[:, 1])

        def variant() -> Tensor:
            others = buffers.num_variants - 1
            drawn = 1 + (uniform(num) * others).to(torch.int64).clamp_(max=max(others - 1, 0))
            plain = uniform(num) < (self.sampling.plain_share if others else 1.0)
            return torch.where(plain, 0, drawn) * buffers.num_groups

        return group + variant(), group + variant(), source, target

    def refill(self) -> None:
        """Draw new pairs into the same storage (a captured graph keeps reading it)."""
        lengths = self.buffers.length
        source_index, target_index, source, target = self._draw()
        need = torch.maximum(lengths[source_index, source], lengths[target_index, target]) + _TAGS_PER_SENTENCE
        slot_class = torch.searchsorted(self._slot_sizes, need.to(torch.int64))
        order = torch.argsort(slot_class, stable=True)
        firsts, sizes, begin = [], [], 0
        for size, count in zip(SLOT_SIZES, torch.bincount(slot_class, minlength=len(SLOT_SIZES)).tolist(), strict=True):
            per_row = ROW_LENGTH // size
            num = count // per_row  # what does not fill a row is dropped: other draws bring it back
            firsts.append(begin + per_row * torch.arange(num, device=order.device))
            sizes.append(torch.full((num,), size, device=order.device))
            begin += count
        first, size_of_row = torch.cat(firsts), torch.cat(sizes)
        shuffle = torch.randperm(len(first), device=order.device, generator=self._generator)
        self.num_rows = len(first)
        self.row_first[: self.num_rows].copy_(first[shuffle])
        self.row_slot_size[: self.num_rows].copy_(size_of_row[shuffle])
        for storage, values in (
            (self.source_index, source_index),
            (self.target_index, target_index),
            (self.source_lang, source),
            (self.target_lang, target),
        ):
            storage.copy_(values[order])

    def batch(self, rows: Tensor) -> Batch:
        """Build the batch of row numbers `rows` int64[B]; device work only, shapes depend on B alone."""
        device = rows.device
        size = self.row_slot_size[rows][:, None]
        position = torch.arange(ROW_LENGTH, device=device)
        slot, offset = position // size, position % size
        in_row = slot < ROW_LENGTH // size
        pair = torch.where(in_row, self.row_first[rows][:, None] + slot, 0)
        source_ids, source_valid = self._sentence(self.source_index[pair], self.source_lang[pair], offset, in_row)
        labels, target_valid = self._sentence(self.target_index[pair], self.target_lang[pair], offset, in_row)
        # decoder input: the labels one later, behind the start token
        starts = target_valid & (offset == 0)
        target_ids = torch.where(starts, self.eos_id, torch.where(target_valid, labels.roll(1, dims=1), self.pad_id))
        # the tag is forced at inference: nothing to learn at offset 0
        labels = torch.where(target_valid & ~starts, labels, IGNORED_LABEL)
        same = slot[:, :, None] == slot[:, None, :]
        diagonal = torch.eye(ROW_LENGTH, dtype=torch.bool, device=device)

        def mask(query_valid: Tensor, key_valid: Tensor) -> Tensor:
            # a padding query sees one key, so that no softmax row is empty
            return torch.where(query_valid[:, :, None], same & key_valid[:, None, :], diagonal)[:, None]

        causal = position[:, None] >= position[None, :]
        return Batch(
            source_ids=source_ids,
            target_ids=target_ids,
            labels=labels,
            positions=offset,
            source_valid=source_valid,
            source_mask=mask(source_valid, source_valid),
            target_mask=mask(target_valid, target_valid) & causal,
            cross_mask=mask(target_valid, source_valid),
        )

    def _sentence(self, index: Tensor, language: Tensor, offset: Tensor, in_row: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int64[B, W] of `tag pieces eos` at `offset` from the beginning of the slot, and where they are real."""
        length = self.buffers.length[index, language].to(torch.int64)
        piece = in_row & (offset > 0) & (offset <= length)
        ids = self.buffers.tokens[torch.where(piece, self.buffers.start[index, language] + offset - 1, 0)].to(torch.int64)
        ids = torch.where(piece, ids, self.pad_id)
        ids = torch.where(in_row & (offset == 0), self.language_ids[language], ids)
        ids = torch.where(in_row & (offset == length + 1), self.eos_id, ids)
        return ids, in_row & (offset <= length + 1)
