"""The gate must let a right engine pass and stop a wrong one: real engines, broken on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from engine.bench.check import CheckResult, check_engine
from engine.bench.engine_run import EngineRun
from engine.bench.inputs import CellInputs
from engine.bench.ours import OurEngine, engine_config, make_runner
from engine.bench.peers import Peer
from engine.bench.random_model import RandomWeights, random_transformer
from engine.bench.shapes import SHAPES, Cell, Variant
from engine.model.mixture_of_experts import MixtureOfExperts
from engine.model.transformer import Transformer

TINY = SHAPES["tiny"]
CELLS = (Cell(16, 1), Cell(6, 4))
WEIGHTS = RandomWeights(TINY, torch.device("cpu"))


@pytest.fixture(scope="module")
def oracle() -> Peer:
    return Peer.random(WEIGHTS, torch.float32, resident=True)


@pytest.fixture(scope="module")
def batches(oracle: Peer) -> list[tuple[CellInputs, EngineRun]]:
    return [(inputs, oracle.run(inputs)) for inputs in (CellInputs.draw(TINY, cell) for cell in CELLS)]


def checks(
    oracle: Peer,
    batches: list[tuple[CellInputs, EngineRun]],
    precision: str,
    damage: Callable[[Transformer], Transformer] = lambda model: model,
    *,
    exact: bool,
) -> list[CheckResult]:
    config = engine_config(
        CELLS, device="cpu", variant=Variant(precision), source_tokens=24, target_tokens=32, num_threads=1
    )
    runner = make_runner(damage(random_transformer(WEIGHTS, config)), config)
    return check_engine(OurEngine(runner, config), oracle, batches, exact=exact)


def with_decoder_experts(model: Transformer, change: Callable[[MixtureOfExperts], MixtureOfExperts]) -> Transformer:
    layers = [
        dataclasses.replace(layer, feed_forward=change(layer.feed_forward))
        if isinstance(layer.feed_forward, MixtureOfExperts)
        else layer
        for layer in model.decoder_layers
    ]
    return dataclasses.replace(model, decoder_layers=tuple(layers))


def forget_output_scale(model: Transformer) -> Transformer:
    return with_decoder_experts(model, lambda layer: dataclasses.replace(layer, output_scale=1.0))


def swap_two_experts(model: Transformer) -> Transformer:
    def swap(layer: MixtureOfExperts) -> MixtureOfExperts:
        first, second = layer.fc2.dequantized(0).clone(), layer.fc2.dequantized(1).clone()
        layer.fc2.set_weight(0, second)
        layer.fc2.set_weight(1, first)
        return layer

    return with_decoder_experts(model, swap)


def skip_experts(model: Transformer) -> Transformer:
    return with_decoder_experts(model, lambda layer: dataclasses.replace(layer, output_scale=0.0))


def drop_positions(model: Transformer) -> Transformer:
    return dataclasses.replace(model, positions=torch.zeros_like(model.positions))


def test_fp32_equals_transformers(oracle: Peer, batches: list[tuple[CellInputs, EngineRun]]) -> None:
    for check in checks(oracle, batches, "fp32", exact=True):
        assert check.failure is None
        assert check.token_agreement == 1.0
        assert check.score_error < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "w8a16", "w4a16"])
def test_half_precision_passes(oracle: Peer, batches: list[tuple[CellInputs, EngineRun]], precision: str) -> None:
    for check in checks(oracle, batches, precision, exact=False):
        assert check.failure is None


@pytest.mark.parametrize("damage", [forget_output_scale, swap_two_experts, drop_positions])
def test_a_wrong_engine_is_refused_in_fp32(
    oracle: Peer,
    batches: list[tuple[CellInputs, EngineRun]],
    damage: Callable[[Transformer], Transformer],
) -> None:
    assert any(check.failure for check in checks(oracle, batches, "fp32", damage, exact=True))


@pytest.mark.parametrize("damage", [forget_output_scale, skip_experts])
def test_a_wrong_engine_is_refused_in_bf16(
    oracle: Peer,
    batches: list[tuple[CellInputs, EngineRun]],
    damage: Callable[[Transformer], Transformer],
) -> None:
    found = checks(oracle, batches, "bf16", damage, exact=False)
    assert any(check.failure for check in found), found


def test_the_judge_sees_tokens_of_another_sentence(oracle: Peer, batches: list[tuple[CellInputs, EngineRun]]) -> None:
    inputs, run = batches[0]
    right = oracle.judge(inputs, run.token_ids)
    wrong = oracle.judge(inputs, run.token_ids[::-1].copy())
    assert right.best_share == 1.0
    assert wrong.best_share < 0.98
