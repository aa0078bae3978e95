"""The slow twin against transformers 4.57.6."""

from __future__ import annotations

import torch

from engine.model.reference import reference_encode, reference_logits
from tests.engine.model.conftest import TinyModel

TOLERANCE = 1e-5


def test_a_padded_batch(tiny: TinyModel) -> None:
    """Padding on the right in HF, none here: encoder output and logits of the real tokens agree."""
    sources = [tiny.random_ids(length, seed=length) for length in (9, 1, 5)]
    targets = [[2, *tiny.random_ids(5, seed=length)] for length in (10, 11, 12)]
    padded = torch.tensor([ids + [1] * (9 - len(ids)) for ids in sources])
    with torch.no_grad():
        output = tiny.oracle(input_ids=padded, attention_mask=(padded != 1).long(), decoder_input_ids=torch.tensor(targets))
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        memory = reference_encode(tiny.weights, tiny.config, source)
        torch.testing.assert_close(memory, output.encoder_last_hidden_state[row, : len(source)], atol=TOLERANCE, rtol=0)
        logits = reference_logits(tiny.weights, tiny.config, source, target)
        torch.testing.assert_close(logits, output.logits[row], atol=2 * TOLERANCE, rtol=0)


def test_cached_positions_count_generated_pad_tokens(tiny: TinyModel) -> None:
    """With a cache HF places the token after a generated pad one row further than a full re-run would."""
    source, target = tiny.random_ids(6, seed=1), [2, 9, 1, 11, 1, 1, 8]
    encoder = tiny.oracle.get_encoder()(input_ids=torch.tensor([source]), attention_mask=torch.ones(1, 6))
    cached = []
    past = None
    with torch.no_grad():
        for token in target:
            output = tiny.oracle(
                encoder_outputs=encoder, attention_mask=torch.ones(1, 6), decoder_input_ids=torch.tensor([[token]]),
                past_key_values=past, use_cache=True,
            )  # fmt: skip
            past = output.past_key_values
            cached.append(output.logits[0, 0])
        rerun = tiny.oracle(encoder_outputs=encoder, decoder_input_ids=torch.tensor([target])).logits[0]
    logits = reference_logits(tiny.weights, tiny.config, source, target)
    torch.testing.assert_close(logits, torch.stack(cached), atol=2 * TOLERANCE, rtol=0)
    assert (logits - rerun).abs().max() > 1e-2  # the two rules do differ here


def test_a_source_with_a_pad_token_inside(tiny: TinyModel) -> None:
    source = [*tiny.random_ids(3, seed=2), 1, *tiny.random_ids(3, seed=3)]
    ids = torch.tensor([source])
    with torch.no_grad():
        expected = tiny.oracle.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    torch.testing.assert_close(
        reference_encode(tiny.weights, tiny.config, source), expected, atol=TOLERANCE, rtol=0
    )  # fmt: skip
