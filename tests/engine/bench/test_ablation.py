from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import engine.model.layers
import engine.quantization.cpu_experts
from engine.bench import step_tape
from engine.bench.ablation import AblatedPart, StepAblation, ablate_step, require_ablation
from engine.bench.floor import StepPart
from engine.bench.inputs import CellInputs
from engine.bench.ours import OurEngine, engine_config
from engine.bench.random_model import RandomWeights, random_transformer
from engine.bench.shapes import SHAPES, Cell, Variant
from engine.bench.step_tape import StepTape, table_copies
from engine.config import ModelConfig
from engine.device_runner import DeviceRunner
from kernels.beam_search.tables import BeamTables

# Three decoder layers: dense, sparse, dense. Head size 16, the least the attention kernels take.
SMALL = ModelConfig(
    vocab_size=71,
    d_model=32,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=64,
    encoder_sparse_step=2,
    decoder_sparse_step=2,
    num_experts=4,
)
CELL = Cell(2, 2)
# The others add to the residual stream, or move the search.
PURE = set(StepPart) - {StepPart.SELF_OUT, StepPart.CROSS_OUT, StepPart.SECOND_DENSE, StepPart.SEARCH}


def small_engine(config: ModelConfig, variant: str, device: str) -> tuple[OurEngine, CellInputs]:
    inputs = dataclasses.replace(CellInputs.draw(config, CELL, source_tokens=5), target_tokens=8)
    options = engine_config(
        (CELL,), device=device, variant=Variant.parse(variant), source_tokens=5, target_tokens=8, num_threads=1
    )
    transformer = random_transformer(RandomWeights(config, torch.device(device)), options)
    return OurEngine(DeviceRunner(transformer, options), options), inputs


@torch.inference_mode()
def test_a_part_is_left_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: the same step again from the same state, whole and without each part in turn. Parts that return
    something return what they did, so the search ends up where it did."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs on machines without a GPU")
    monkeypatch.setattr(engine.model.layers, "can_pack", lambda dtype, device: False)
    monkeypatch.setattr(engine.quantization.cpu_experts, "can_pack", lambda dtype, device: False)
    ours, inputs = small_engine(SMALL, "fp32", "cpu")
    assert isinstance(ours.runner, DeviceRunner)
    ours.encode(inputs)
    ours.start(inputs)
    for _ in range(3):
        ours.runner.decode()
    step, tables = ours.runner.next_step()
    tape = StepTape(saved=table_copies(tables))
    with tape.recording():
        step()
    after = [one.clone() for one in tensors(tables)]
    once, twice = (StepPart.EXPERTS, StepPart.ROUTER, StepPart.HEAD), (StepPart.FIRST_DENSE, StepPart.SECOND_DENSE)
    wanted = dict.fromkeys(StepPart, 3) | dict.fromkeys(once, 1) | dict.fromkeys(twice, 2)
    assert Counter(call.part for call in tape.calls) == wanted
    assert tape.parts == list(StepPart)
    assert 1 <= tape.experts_touched() <= 4
    ran = Counter[str]()
    for module, name, _ in step_tape._CALLS:
        monkeypatch.setattr(module, name, counted(getattr(module, name), ran))
    tape.restore()
    step()
    whole = ran.copy()
    for part in (None, *StepPart):
        tape.restore()
        ran.clear()
        with tape.without(part):
            step()
        missing = whole - ran
        assert missing.total() == (0 if part is None else wanted[part]), part
        owners = {name: owner for _, name, owner in step_tape._CALLS}
        assert all(owners[name] in (part, None) for name in missing), part
        is_same = all(torch.equal(now, then) for now, then in zip(tensors(tables), after, strict=True))
        assert is_same == (part is None or part in PURE), part


def counted(function: Callable[..., Any], ran: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ran[function.__name__] += 1
        return function(*args, **kwargs)

    return call


def tensors(tables: BeamTables) -> list[torch.Tensor]:
    return [getattr(tables, one.name) for one in dataclasses.fields(tables)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "variant"),
    [({}, "w4a16"), ({}, "bf16+inv"), ({"d_model": 256, "num_experts": 16, "decoder_attention_heads": 4}, "w4a16+d8")],
)
def test_the_table_of_a_captured_step(changes: dict[str, int], variant: str) -> None:
    """Every launch belongs to a part, and the engine translates afterwards as it did before."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    config = dataclasses.replace(SHAPES["tiny"], **changes)
    ours, inputs = small_engine(config, variant, "cuda")
    before = ours.run(inputs)
    ablation = ablate_step(ours, inputs, config, 3e12, repeats=3)
    assert ablation.uncounted_launches == 0
    assert [part.part for part in ablation.parts] == list(StepPart)
    assert min(part.launches for part in ablation.parts) >= 1
    assert (ablation.step, ablation.num_steps) == (4, 7)
    assert 1 <= ablation.experts_touched <= config.num_experts
    assert 0 < ablation.empty_launch_us < 100
    assert ablation.step_us > 0
    after = ours.run(inputs)
    assert (after.token_ids == before.token_ids).all()
    assert after.scores == before.scores


def test_the_table_adds_up() -> None:
    parts = (
        AblatedPart(StepPart.EXPERTS, launches=6, added_us=350.0, read_bytes=800_000_000, floor_us=200.0),
        AblatedPart(StepPart.SEARCH, launches=3, added_us=7.5, read_bytes=0, floor_us=0.0),
    )
    ablation = StepAblation("80x4", 16, 31, 40, 715.0, 10, 0.5, 31.5, parts)
    assert ablation.sum_us == 357.5
    assert ablation.floor_us == 200.0
    assert ablation.uncounted_launches == 1
    head, columns, experts, search, total, empty, uncounted, touched = ablation.table().splitlines()
    assert head == "80x4, step 16 of 31: 715.0 us, 40 pairs a part"
    assert columns.split() == ["part", "launches", "us", "added", "MB", "bytes", "alone,", "us", "share"]
    assert experts.split() == ["experts", "6", "350.0", "800.0", "200.0", "49.0%"]
    assert search.split() == ["search", "and", "embedding", "3", "7.5", "-", "-", "1.0%"]
    assert total.split() == ["all", "of", "these", "9", "357.5", "800.0", "200.0", "50.0%"]
    assert empty.split() == ["empty", "launches", "10", "5.0"]
    assert uncounted.strip() == "1 of 10 launches belong to none of these parts"
    assert touched.endswith("31.5")
    assert "none of these parts" not in dataclasses.replace(ablation, launches=9).table()
    assert json.loads(json.dumps(dataclasses.asdict(ablation)))["parts"][0]["part"] == "experts"


def test_models_without_captured_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="--device cuda"):
        require_ablation(SHAPES["paper"], torch.device("cpu"))
    odd = dataclasses.replace(SHAPES["tiny"], d_model=192, decoder_attention_heads=4)
    with pytest.raises(ValueError, match="heads of"):
        require_ablation(odd, torch.device("cuda"))
    require_ablation(SHAPES["paper"], torch.device("cuda"))
