"""Layout and limits of the key/value cache."""

from __future__ import annotations

import pytest
import torch

from engine.config import ModelConfig
from engine.kv_cache import KVCache
from tests.engine.tiny import TINY_ODD, tiny_config

LIMITS = {"num_rows": 3, "max_target_tokens": 5, "num_source_slots": 2, "max_source_tokens": 7}


def allocate(**limits: int) -> KVCache:
    config = ModelConfig.from_dict(tiny_config(**TINY_ODD).to_dict())
    return KVCache.allocate(config, **{**LIMITS, **limits}, dtype=torch.float32, device=torch.device("cpu"))


def test_cells_are_views_in_row_major_order() -> None:
    cache = allocate()
    cache.self_cells(1)[2 * 5 + 3] = torch.arange(72.0)
    assert torch.equal(cache.self_kv[1, 2, 3, 0].reshape(-1), torch.arange(36.0))  # the key
    assert torch.equal(cache.self_kv[1, 2, 3, 1].reshape(-1), torch.arange(36.0, 72.0))  # the value
    cache.cross_cells(0)[1 * 16 + 6] = 1.0
    assert cache.cross_kv[0, 1, 6].eq(1.0).all() and cache.cross_kv.sum() == 72


def test_limits_and_head_dimension() -> None:
    cache = allocate()
    assert (cache.num_rows, cache.max_target_tokens, cache.num_source_slots, cache.max_source_tokens) == (3, 5, 2, 16)
    assert cache.self_kv.shape[-2:] == (4, 9) and cache.self_kv.is_contiguous()
    assert cache.source_lengths.dtype == torch.int32


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        allocate(**{name: 0})
