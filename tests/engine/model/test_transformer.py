"""Transformer with packed encoder and cached decoder against transformers 4.57.6 and the slow twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kv_cache import KVCache
from engine.model.reference import reference_encode, reference_logits
from engine.model.transformer import Transformer
from tests.engine.model.conftest import TinyModel

TOLERANCE = 2e-5


def make_cache(transformer: Transformer, fill: float = 0.0) -> KVCache:
    cache = KVCache.allocate(
        transformer.config, num_rows=9, max_target_tokens=12, num_source_slots=5, max_source_tokens=16,
        dtype=transformer.dtype, device=transformer.device,
    )  # fmt: skip
    cache.self_kv.fill_(fill)
    cache.cross_kv.fill_(fill)
    return cache


def encode(transformer: Transformer, cache: KVCache, sources: list[list[int]], slots: list[int]) -> Tensor:
    ids = torch.tensor([token for source in sources for token in source])
    offsets = torch.tensor([0, *(len(source) for source in sources)]).cumsum(0)
    memory = transformer.encode(ids, offsets)
    transformer.write_cross_kv(memory, offsets, torch.tensor(slots), cache)
    return memory


def decode_alone(transformer: Transformer, cache: KVCache, target: list[int], row: int, slot: int) -> Tensor:
    """Logits [T, V] of one hypothesis, one step at a time, always in the same row."""
    steps = [
        transformer.decode(
            torch.tensor([token]), torch.tensor([position]), torch.tensor([row]), torch.tensor([slot]),
            torch.full((1, position + 1), row), cache,
        )
        for position, token in enumerate(target)
    ]  # fmt: skip
    return torch.cat(steps)


@pytest.mark.parametrize("trimmed", [True, False])
def test_a_padded_batch_of_transformers(tiny: TinyModel, trimmed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """trimmed False: index tensors as a GPU gets them, full length and one group per row."""
    monkeypatch.setattr("engine.model.attention._is_on_cpu", lambda tensor: trimmed)
    sources = [tiny.random_ids(length, seed=length) for length in (9, 1, 5, 5)]
    targets = torch.tensor([[2, *tiny.random_ids(7, seed=length)] for length in (10, 11, 12, 13)])
    padded = torch.tensor([ids + [1] * (9 - len(ids)) for ids in sources])
    with torch.no_grad():
        expected = tiny.oracle(input_ids=padded, attention_mask=(padded != 1).long(), decoder_input_ids=targets)
    cache = make_cache(tiny.transformer, fill=float("nan"))
    slots, rows = torch.tensor([4, 0, 3, 1]), torch.tensor([8, 2, 0, 5])
    memory = encode(tiny.transformer, cache, sources, slots.tolist())
    for sentence, part in enumerate(memory.split([9, 1, 5, 5])):
        torch.testing.assert_close(part, expected.encoder_last_hidden_state[sentence, : len(part)], atol=TOLERANCE, rtol=0)
    for position in range(8):
        ancestry = rows[:, None].repeat(1, position + 1 if trimmed else 12)
        logits = tiny.transformer.decode(targets[:, position], torch.full((4,), position), rows, slots, ancestry, cache)
        assert logits.shape == (4, tiny.config.vocab_size) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected.logits[:, position], atol=TOLERANCE, rtol=0)


def test_random_beam_ancestry(tiny: TinyModel) -> None:
    """Beams of two sentences swap prefixes at random and start at different steps; every hypothesis is re-run in full.

    Cells never written hold NaN, and ancestry beyond a row's position points anywhere.
    """
    generator = torch.Generator().manual_seed(3)
    sources = [tiny.random_ids(7, seed=20), tiny.random_ids(4, seed=21)]
    cache = make_cache(tiny.transformer, fill=float("nan"))
    encode(tiny.transformer, cache, sources, slots=[2, 4])
    beams = {0: [6, 1, 3], 1: [7, 0]}  # sentence -> cache rows
    slot_of, start_of = {0: 2, 1: 4}, {0: 0, 1: 3}
    hypotheses = {row: ([2], [row]) for rows in beams.values() for row in rows}  # row -> (tokens, ancestry)
    for step in range(9):
        live = [(s, row) for s, rows in beams.items() if start_of[s] <= step for row in rows]
        order = torch.randperm(len(live), generator=generator).tolist()
        live = [live[i] for i in order]
        tokens = torch.tensor([hypotheses[row][0][-1] for _, row in live])
        positions = torch.tensor([len(hypotheses[row][0]) - 1 for _, row in live])
        ancestry = torch.randint(0, cache.num_rows, (len(live), 11), generator=generator)
        for index, (_, row) in enumerate(live):
            ancestry[index, : positions[index] + 1] = torch.tensor(hypotheses[row][1])
        logits = tiny.transformer.decode(
            tokens, positions, torch.tensor([row for _, row in live]), torch.tensor([slot_of[s] for s, _ in live]),
            ancestry, cache,
        )  # fmt: skip
        for index, (sentence, row) in enumerate(live):
            expected = reference_logits(tiny.weights, tiny.config, sources[sentence], hypotheses[row][0])[-1]
            torch.testing.assert_close(logits[index], expected, atol=TOLERANCE, rtol=0)
        for sentence, rows in beams.items():
            if start_of[sentence] > step:
                continue
            parents = [rows[int(torch.randint(0, len(rows), (), generator=generator))] for _ in rows]
            new_tokens = torch.randint(0, tiny.config.vocab_size, (len(rows),), generator=generator).tolist()
            old = dict(hypotheses)
            for row, parent, token in zip(rows, parents, new_tokens, strict=True):
                hypotheses[row] = ([*old[parent][0], token], [*old[parent][1], row])


def test_a_generated_pad_token_follows_the_cached_rule(tiny: TinyModel) -> None:
    source, target = tiny.random_ids(5, seed=4), [2, 9, 1, 11, 1, 1, 8]
    cache = make_cache(tiny.transformer)
    encode(tiny.transformer, cache, [source], slots=[0])
    torch.testing.assert_close(
        decode_alone(tiny.transformer, cache, target, row=3, slot=0),
        reference_logits(tiny.weights, tiny.config, source, target),
        atol=TOLERANCE,
        rtol=0,
    )


def test_a_source_with_a_pad_token_inside(tiny: TinyModel) -> None:
    source = [*tiny.random_ids(3, seed=5), 1, *tiny.random_ids(3, seed=6)]
    memory = encode(tiny.transformer, make_cache(tiny.transformer), [[7, 8], source], slots=[0, 1])
    torch.testing.assert_close(
        memory[2:], reference_encode(tiny.weights, tiny.config, source), atol=TOLERANCE, rtol=0
    )  # fmt: skip


def test_batch_mates_change_nothing_but_float_noise(tiny: TinyModel) -> None:
    source, target = tiny.random_ids(6, seed=7), [2, *tiny.random_ids(6, seed=8)]
    alone_cache, crowded_cache = make_cache(tiny.transformer), make_cache(tiny.transformer)
    alone = encode(tiny.transformer, alone_cache, [source], slots=[0])
    mates = [tiny.random_ids(length, seed=30 + length) for length in (11, 1, 6, 8)]
    crowded = encode(tiny.transformer, crowded_cache, [*mates[:2], source, *mates[2:]], slots=[3, 1, 0, 2, 4])
    torch.testing.assert_close(crowded[12:18], alone, atol=1e-5, rtol=0)
    expected = decode_alone(tiny.transformer, alone_cache, target, row=0, slot=0)
    for position, token in enumerate(target):
        logits = tiny.transformer.decode(
            torch.tensor([5, token, 6, 7, 8]), torch.full((5,), position), torch.tensor([8, 0, 5, 6, 7]),
            torch.tensor([3, 0, 1, 2, 0]), torch.tensor([[8], [0], [5], [6], [7]]).repeat(1, position + 1), crowded_cache,
        )  # fmt: skip
        torch.testing.assert_close(logits[1], expected[position], atol=TOLERANCE, rtol=0)


def test_a_reused_slot_and_row_forget_the_former_sentence(tiny: TinyModel) -> None:
    cache = make_cache(tiny.transformer)
    encode(tiny.transformer, cache, [tiny.random_ids(11, seed=9)], slots=[1])
    decode_alone(tiny.transformer, cache, [2, *tiny.random_ids(9, seed=10)], row=2, slot=1)
    source, target = tiny.random_ids(3, seed=11), [2, *tiny.random_ids(4, seed=12)]
    encode(tiny.transformer, cache, [source], slots=[1])
    torch.testing.assert_close(
        decode_alone(tiny.transformer, cache, target, row=2, slot=1),
        reference_logits(tiny.weights, tiny.config, source, target),
        atol=TOLERANCE,
        rtol=0,
    )


def test_permuting_experts_two_and_up_changes_logits(tiny: TinyModel) -> None:
    """transformers 5.0 to 5.23 call experts 0 and 1 only and would not notice."""
    if not tiny.config.has_sparse_layers or tiny.config.num_experts < 4:
        pytest.skip("needs experts to permute")
    source, target = tiny.random_ids(9, seed=13), [2, *tiny.random_ids(8, seed=14)]
    cache = make_cache(tiny.transformer)
    encode(tiny.transformer, cache, [source], slots=[0])
    logits = decode_alone(tiny.transformer, cache, target, row=0, slot=0)
    permuted = dict(tiny.weights)
    for name in tiny.weights:
        if ".experts." in name:
            expert = int(name.split("expert_")[1].split(".")[0])
            if expert >= 2:
                other = tiny.config.num_experts + 1 - expert
                permuted[name] = tiny.weights[name.replace(f"expert_{expert}.", f"expert_{other}.")]
    assert (reference_logits(permuted, tiny.config, source, target) - logits).abs().max() > 0.1


def test_bad_input_is_refused(tiny: TinyModel) -> None:
    with pytest.raises(ValueError, match="no empty one"):
        tiny.transformer.encode(torch.tensor([5, 6]), torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match="at least one sentence"):
        tiny.transformer.encode(torch.tensor([], dtype=torch.int64), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"42 tokens; the position table covers 41"):
        tiny.transformer.encode(torch.full((42,), 5), torch.tensor([0, 42]))
    memory = torch.zeros(17, tiny.config.d_model)
    with pytest.raises(ValueError, match="17 tokens; a cache slot holds 16"):
        tiny.transformer.write_cross_kv(memory, torch.tensor([0, 17]), torch.tensor([0]), make_cache(tiny.transformer))


def test_decoding_beyond_the_cache_or_from_an_empty_slot_is_refused(tiny: TinyModel) -> None:
    cache = make_cache(tiny.transformer)
    encode(tiny.transformer, cache, [[5, 6, 7]], slots=[1])
    one = torch.tensor([1])

    def step(position: int, slot: int, columns: int) -> None:
        ancestry = torch.ones(1, columns, dtype=torch.int64)
        tiny.transformer.decode(torch.tensor([5]), torch.tensor([position]), one, torch.tensor([slot]), ancestry, cache)

    step(11, 1, 12)
    with pytest.raises(ValueError, match="position 12 is beyond ancestry's 13 columns or the cache's 12 positions"):
        step(12, 1, 13)
    with pytest.raises(ValueError, match="position 3 is beyond ancestry's 1 columns"):
        step(3, 1, 1)
    with pytest.raises(ValueError, match=r"source slots \[2\] were never written"):
        step(0, 2, 1)
