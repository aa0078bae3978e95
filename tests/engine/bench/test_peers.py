from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.demo
from engine.bench.checkpoint_files import write_checkpoint
from engine.bench.inputs import CellInputs
from engine.bench.peers import Peer, PeerError, transformers_version
from engine.bench.random_model import RandomWeights
from engine.bench.shapes import SHAPES, Cell, with_gating
from engine.config import ModelConfig
from tests.engine.tiny import TINY_ODD, load_hf_model, make_tiny_checkpoint

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def peer() -> Peer:
    return Peer.random(RandomWeights(TINY, torch.device("cpu")), torch.float32, resident=True)


@pytest.mark.parametrize("cell", [Cell(1, 1), Cell(5, 1), Cell(3, 4)], ids=str)
def test_grouped_gemm_gives_the_tokens_of_the_loop(peer: Peer, cell: Cell) -> None:
    inputs = CellInputs.draw(TINY, cell)
    loop, grouped = peer.run(inputs), peer.run(inputs, "grouped")
    assert (loop.token_ids == grouped.token_ids).all()
    assert (loop.token_ids[:, 0] == inputs.forced_token_ids).all()
    assert loop.token_ids.shape == (cell.batch, 32)
    assert (peer.run(inputs).token_ids == loop.token_ids).all(), "the loop is back in place"


def test_grouped_gemm_equals_the_loop_layer_by_layer(peer: Peer) -> None:
    """One token per expert, many, and experts without any; bf16-free, so equal to rounding."""
    (_, ffn), *_ = peer._sparse_layers()
    for num_tokens in (1, 2, 37):
        x = torch.randn(1, num_tokens, TINY.d_model, generator=torch.Generator().manual_seed(num_tokens))
        with torch.inference_mode():
            expected = ffn(x, None)[0]
            with peer._grouped():
                found = ffn(x, None)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_one_expert_a_token_in_both_peers() -> None:
    """Against a loop over tokens: the first choice, its probability as gate, the factor on expert outputs as configured."""
    config = with_gating(TINY, 1)
    switch = Peer.random(RandomWeights(config, torch.device("cpu")), torch.float32, resident=True)
    (_, ffn), *_ = switch._sparse_layers()
    x = torch.randn(23, TINY.d_model, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        rows = []
        for token in x:
            probabilities = ffn.router.classifier(token).softmax(dim=0)
            expert = int(probabilities.argmax())
            rows.append(0.8 * probabilities[expert] * ffn.experts[f"expert_{expert}"](token))
        with switch._grouped():
            grouped = ffn(x[None], None)[0]
        torch.testing.assert_close(ffn(x[None], None)[0][0], torch.stack(rows), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grouped[0], torch.stack(rows), atol=1e-5, rtol=1e-5)
    inputs = CellInputs.draw(config, Cell(5, 2))
    with switch.recording_experts() as counts:
        run = switch.run(inputs)
    assert (switch.run(inputs, "grouped").token_ids == run.token_ids).all()
    touched, uniform = counts.touched("decoder", 10)
    assert uniform == pytest.approx(8 * (1 - 0.875**10))
    assert 0.9 * uniform < touched <= 8
    assert transformers_version(config) == "4.57.6, router patched to top-1"
    assert transformers_version(TINY) == "4.57.6"


def test_a_checkpoint_runs_as_transformers_runs_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Odd sizes; stacking the experts and prompting with two tokens must not change what generate() gives."""
    directory = make_tiny_checkpoint(tmp_path_factory.mktemp("odd"), seed=5, **TINY_ODD)
    peer = Peer.checkpoint(directory, torch.float32, torch.device("cpu"))
    inputs = CellInputs.draw(ModelConfig.from_checkpoint(directory), Cell(4, 3), forced_choices=(7,), source_tokens=9)
    sources = torch.from_numpy(inputs.source_token_ids).long()
    expected = load_hf_model(directory).generate(
        input_ids=sources,
        attention_mask=torch.ones_like(sources),
        forced_bos_token_id=7,
        num_beams=3,
        max_new_tokens=32,
        min_new_tokens=32,
    )
    assert np.array_equal(peer.run(inputs).token_ids, expected[:, 1:].numpy())


def test_judging_gives_the_scores_of_beam_search(peer: Peer) -> None:
    """transformers' own sequences_scores, from the cached search, against one uncached pass."""
    inputs = CellInputs.draw(TINY, Cell(3, 4))
    run = peer.run(inputs)
    sources = torch.from_numpy(inputs.source_token_ids).long()
    forced = torch.from_numpy(inputs.forced_token_ids).long()
    output = peer.model.generate(
        input_ids=sources,
        attention_mask=torch.ones_like(sources),
        decoder_input_ids=torch.stack([torch.full_like(forced, 2), forced], dim=1),
        num_beams=4,
        max_new_tokens=31,
        min_new_tokens=31,
        return_dict_in_generate=True,
        output_scores=True,
    )
    judged = peer.judge(inputs, run.token_ids)
    expected = output.sequences_scores * 31 / 32  # generate() does not count the prompt; our length counts the forced token
    assert np.allclose(judged.scores, expected.numpy(), atol=1e-5)


def test_experts_are_counted_per_call(peer: Peer) -> None:
    inputs = CellInputs.draw(TINY, Cell(3, 2))
    seen: list[set[int]] = []

    def record(module: object, arguments: object, output: tuple[torch.Tensor, ...]) -> None:
        if output[1].shape[0] == 6:
            seen.append({int(e) for e in output[1].nonzero()[:, 1]})

    hooks = [ffn.router.register_forward_hook(record) for name, ffn in peer._sparse_layers() if ".decoder." in name]
    with peer.recording_experts() as counts:
        peer.run(inputs)
    for hook in hooks:
        hook.remove()
    touched, uniform = counts.touched("decoder", 6)
    assert len(seen) == 2 * 30  # two sparse layers; the first step takes two tokens per row
    assert touched == pytest.approx(sum(map(len, seen)) / len(seen))
    assert uniform == pytest.approx(8 * (1 - 0.75**6))
    with pytest.raises(ValueError, match="7 tokens"):
        counts.touched("decoder", 7)


def test_what_a_peer_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_on_use = Peer.random(RandomWeights(TINY, torch.device("cpu")), torch.float32, resident=False)
    with pytest.raises(PeerError, match="in memory"):
        drawn_on_use.run(CellInputs.draw(TINY, Cell(1, 1)), "grouped")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PeerError, match="pip install transformers"):
        transformers_version(TINY)


def test_the_demonstration_model_loads_as_a_peer() -> None:
    from pathlib import Path

    checkpoint = Path(engine.demo.__file__).parent / "checkpoint"
    peer = Peer.checkpoint(checkpoint, torch.float32, torch.device("cpu"))
    inputs = CellInputs.draw(peer.config, Cell(2, 1), source_tokens=6)
    assert (peer.run(inputs).token_ids == peer.run(inputs, "grouped").token_ids).all()


def test_a_written_random_model_is_the_one_that_was_drawn(tmp_path: Path) -> None:
    """Untied, transformers 4.57.6 draws the encoder's and the decoder's embedding at random when it reads a checkpoint."""
    weights = RandomWeights(TINY, torch.device("cpu"), seed=3)
    write_checkpoint(weights, tmp_path / "out", None)
    inputs = CellInputs.draw(TINY, Cell(4, 2))
    drawn = Peer.random(weights, torch.float32, resident=True).run(inputs)
    read = Peer.checkpoint(tmp_path / "out", torch.float32, torch.device("cpu")).run(inputs)
    assert (read.token_ids == drawn.token_ids).all()
