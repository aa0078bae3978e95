"""A sentence's logits do not depend on its batch mates: not by one bit on CPUs with AMX, where this was found to hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.model.transformer import Transformer
from engine.weights.loading import load_transformer
from tests.engine.tiny import TINY_ODD, make_tiny_checkpoint

WIDER = {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 192, "vocab_size": 517, "num_experts": 8}
TARGET = [2, 7, 21, 8, 40, 33, 12, 5, 19, 50, 44, 3, 9, 28, 31, 6, 17, 22, 41, 10]  # crosses a block of 16 positions


@pytest.fixture(scope="module", params=["fp32", "bf16", "w8a16", "w4a16", "w4a16-g64"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_source(length: int) -> Tensor:
    return torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(length))


def forced_decoding(transformer: Transformer, sources: list[Tensor], beams: list[int]) -> tuple[Tensor, Tensor]:
    """Memory of the last sentence and logits [T, V] of its first row, with mates of other lengths, beams and positions."""
    offsets = torch.tensor([0, *(len(source) for source in sources)]).cumsum(0)
    rows = torch.arange(sum(beams))
    slots = torch.arange(len(beams)).repeat_interleave(torch.tensor(beams))
    cache = KVCache.allocate(
        transformer.config, num_rows=len(rows), max_target_tokens=40, num_source_slots=len(beams), max_source_tokens=48,
        dtype=transformer.dtype, device=transformer.device,
    )  # fmt: skip
    memory = transformer.encode(torch.cat(sources), offsets)
    transformer.write_cross_kv(memory, offsets, torch.arange(len(sources)), cache)
    ours = sum(beams[:-1])
    logits = []
    for position, token in enumerate(TARGET):
        tokens, positions = (rows * 5 + position) % 47 + 3, (position + 3 * slots) % 33
        tokens[ours:], positions[ours:] = token, position
        ancestry = rows[:, None].repeat(1, 33)
        logits.append(transformer.decode(tokens, positions, rows, slots, ancestry, cache)[ours])
    return memory[offsets[-2] :], torch.stack(logits)


@pytest.mark.parametrize("overrides", [TINY_ODD, WIDER], ids=["odd", "wider"])
def test_alone_and_in_company(overrides: dict[str, int], precision: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=8, **overrides)
    transformer = load_transformer(checkpoint, EngineConfig(precision=precision, max_source_tokens=48, max_target_tokens=40))
    source = random_source(11)
    memory_alone, alone = forced_decoding(transformer, [source], beams=[1])
    for lengths, beams in (([3], [1, 4]), ([30, 11, 1, 40, 17], [4, 1, 5, 2, 8, 3]), ([11] * 9, [4] * 9 + [1])):
        memory, company = forced_decoding(transformer, [*map(random_source, lengths), source], beams)
        if torch.cpu._is_amx_tile_supported():
            assert torch.equal(memory, memory_alone)
            assert torch.equal(company, alone)
        elif precision == "fp32":
            torch.testing.assert_close(company, alone, atol=2e-5, rtol=0)
