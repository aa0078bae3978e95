"""The trainer's batches, network, optimizer and files against plain rules and against transformers."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as TokenizersTokenizer

from engine.config import ModelConfig
from engine.demo.training.batches import IGNORED_LABEL, ROW_LENGTH, PairPool, Sampling
from engine.demo.training.checkpoint import named_views, read_checkpoint, write_checkpoint
from engine.demo.training.encoding import MAX_PIECES, CorpusError, TextGroups, TokenBuffers, encode_groups
from engine.demo.training.network import TrainingNetwork
from engine.demo.training.optimizer import MuonAdamW, orthogonalize
from engine.demo.training.options import TrainingOptions
from engine.demo.training.trainer import Trainer, demo_model_config

DEMO = Path(__file__).parents[3] / "engine" / "demo"
CHECKPOINT = DEMO / "checkpoint"
LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan", "tur_Latn")
PAD, EOS = 1, 2


def small_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=4,
    )


def random_buffers(num_groups: int, num_variants: int = 1, seed: int = 0) -> TokenBuffers:
    """Random ids 10..199; about a fifth of the languages absent; lengths up to the longest that fits a row."""
    rng = np.random.default_rng(seed)
    shape = (num_variants * num_groups, len(LANGUAGES))
    length = rng.integers(1, 20, shape)
    length[0] = ROW_LENGTH - 2
    present = np.tile(rng.random((num_groups, len(LANGUAGES))) > 0.2, (num_variants, 1))
    length = np.where(present, length, 0)
    start = np.cumsum(length).reshape(shape) - length
    tokens = rng.integers(10, 200, int(length.sum()))
    return TokenBuffers(
        torch.from_numpy(tokens).int(),
        torch.from_numpy(start).int(),
        torch.from_numpy(length).int(),
        torch.from_numpy(rng.random(num_groups) < 0.6),
        LANGUAGES,
    )


def pool_of(buffers: TokenBuffers, *, num_pairs: int = 4000, cldr_share: float = 0.3, pivot_weight: float = 4.0) -> PairPool:
    return PairPool(
        buffers,
        torch.arange(len(LANGUAGES)) + 200,
        Sampling(cldr_share, pivot_weight=pivot_weight),
        num_pairs=num_pairs,
        pad_id=PAD,
        eos_id=EOS,
        generator=torch.Generator().manual_seed(3),
    )


@pytest.mark.parametrize("num_variants", [1, 3])
def test_batch_holds_the_sentences_of_its_slots(num_variants: int) -> None:
    buffers = random_buffers(300, num_variants)
    pool = pool_of(buffers)
    rows = torch.arange(pool.num_rows)
    batch = pool.batch(rows)
    seen_variants = set()
    for row in rows.tolist():
        size, first = int(pool.row_slot_size[row]), int(pool.row_first[row])
        for slot in range(ROW_LENGTH // size):
            pair = first + slot

            def pieces(index: torch.Tensor, lang: torch.Tensor, pair: int = pair) -> tuple[int, list[int]]:
                i, column = int(index[pair]), int(lang[pair])
                begin = int(buffers.start[i, column])
                return column, buffers.tokens[begin : begin + int(buffers.length[i, column])].tolist()

            source, source_ids = pieces(pool.source_index, pool.source_lang)
            target, target_ids = pieces(pool.target_index, pool.target_lang)
            seen_variants.add(int(pool.source_index[pair]) // buffers.num_groups)
            assert source != target
            assert int(pool.source_index[pair]) % buffers.num_groups == int(pool.target_index[pair]) % buffers.num_groups
            at = slice(slot * size, (slot + 1) * size)

            def padded(ids: list[int], value: int, size: int = size) -> list[int]:
                return ids + [value] * (size - len(ids))

            assert batch.source_ids[row, at].tolist() == padded([200 + source, *source_ids, EOS], PAD)
            assert batch.target_ids[row, at].tolist() == padded([EOS, 200 + target, *target_ids], PAD)
            assert batch.labels[row, at].tolist() == padded([IGNORED_LABEL, *target_ids, EOS], IGNORED_LABEL)
    assert seen_variants == set(range(num_variants))


def test_draws_follow_the_asked_shares() -> None:
    buffers = random_buffers(400)
    buffers.length[:] = 3  # every language everywhere
    pool = pool_of(buffers, num_pairs=40_000, cldr_share=0.25, pivot_weight=4.0)
    cldr = (~buffers.is_interface)[pool.source_index % buffers.num_groups].float().mean()
    assert abs(float(cldr) - 0.25) < 0.02
    english = ((pool.source_lang == 0) | (pool.target_lang == 0)).float().mean()
    # two of four without replacement, weights 4 1 1 1: 1 - (3/7)(2/6)
    assert abs(float(english) - (1 - 3 / 7 * 2 / 6)) < 0.02


def test_no_pair_of_languages_is_an_error() -> None:
    buffers = random_buffers(5)
    buffers.length[:, 1:] = 0
    with pytest.raises(CorpusError, match="two languages"):
        pool_of(buffers)


def test_network_agrees_with_transformers_and_files_round_trip(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = TrainingNetwork(small_config(256), dropout=0.1, label_smoothing=0.1, balance_weight=0.01)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    network.eval()
    write_checkpoint(network, tmp_path, dtype=torch.float32)
    other, info = transformers.NllbMoeForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    other.eval()
    pool = pool_of(random_buffers(60))
    rows = torch.arange(min(6, pool.num_rows))
    batch = pool.batch(rows)
    total, count = 0.0, 0
    with torch.no_grad():
        ours = float(network(batch)["nll"])
        for row in range(len(rows)):
            size = int(pool.row_slot_size[row])
            for begin in range(0, ROW_LENGTH // size * size, size):
                at = slice(begin, begin + size)
                source = batch.source_ids[row, at][batch.source_valid[row, at]][None]
                labels = batch.labels[row, at][1:]
                num = int((labels != IGNORED_LABEL).sum())
                target = batch.target_ids[row, at][: num + 1][None]
                logits = other(
                    input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=target
                ).logits.log_softmax(-1)[0, 1:]
                total -= float(logits.gather(-1, labels[:num, None]).sum())
                count += num
    assert ours == pytest.approx(total / count, rel=1e-5)
    again = TrainingNetwork(small_config(256), dropout=0.1, label_smoothing=0.1, balance_weight=0.01)
    read_checkpoint(again, tmp_path)
    for (name, ours_view), (_, view) in zip(named_views(network), named_views(again), strict=True):
        assert torch.equal(ours_view, view), name


def test_sparse_gradient_reaches_chosen_experts_only() -> None:
    torch.manual_seed(0)
    network = TrainingNetwork(small_config(64), dropout=0.0, label_smoothing=0.0, balance_weight=0.0)
    sparse = network.encoder[1].ff  # type: ignore[union-attr]
    x = torch.randn(1, 1, 32)
    out, _, _ = sparse(x, torch.ones(1, 1, dtype=torch.bool))
    out.sum().backward()
    touched = sparse.fc2_weight.grad.abs().sum((1, 2)) > 0
    assert int(touched.sum()) == 2


def test_orthogonalize_flattens_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((2, 64, 32), (2, 32, 64), (2, 48, 48)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.4


def test_optimizer_learns_and_its_state_continues_exactly() -> None:
    def trained(steps: int, state: dict[str, torch.Tensor] | None = None) -> tuple[list[float], MuonAdamW]:
        torch.manual_seed(1)
        network = TrainingNetwork(small_config(256), dropout=0.0, label_smoothing=0.0, balance_weight=0.01)
        optimizer = MuonAdamW(network, compute_dtype=torch.float32, weight_decay=0.01)
        if state is not None:
            optimizer.load_state_dict(state)
        batch = pool_of(random_buffers(40)).batch(torch.arange(4))
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = network(batch)["loss"]
            loss.backward()
            losses.append(loss.item())
            optimizer.step(torch.tensor(3e-3))
        return losses, optimizer

    whole, _ = trained(30)
    assert whole[-1] < 0.75 * whole[0]
    _, half = trained(15)
    state = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    rest, _ = trained(15, state)
    np.testing.assert_allclose(rest, whole[15:], rtol=1e-4)


def write_corpus(path: Path) -> Path:
    groups = []
    with gzip.open(DEMO / "heldout.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            group = json.loads(line)
            group["split"] = "valid" if number % 4 == 0 else "train"
            groups.append(group)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(group) + "\n" for group in groups[::12] + groups[1::12])
    return path


def test_encoding_keeps_every_text_and_variants_spell_the_same(tmp_path: Path) -> None:
    groups = TextGroups.read(write_corpus(tmp_path / "texts.jsonl.gz"), "train")
    backend = TokenizersTokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    buffers = encode_groups(groups, CHECKPOINT / "tokenizer.json", LANGUAGES, num_variants=3, bpe_dropout=0.3)
    assert buffers.num_variants == 3
    differ = 0
    for g, texts in enumerate(groups.texts):
        for column, code in enumerate(LANGUAGES):
            spelled = []
            for variant in range(3):
                i = variant * buffers.num_groups + g
                begin, size = int(buffers.start[i, column]), int(buffers.length[i, column])
                fits = code in texts and len(backend.encode(texts[code], add_special_tokens=False).ids) <= MAX_PIECES
                assert (size > 0) == fits
                spelled.append(buffers.tokens[begin : begin + size].tolist())
            if spelled[0]:
                assert all(backend.decode(ids) == texts[code] for ids in spelled)
                differ += spelled[0] != spelled[1]
                if not groups.is_interface[g]:
                    assert spelled[0] == spelled[1] == spelled[2]
    assert differ > 50


def test_absent_corpus_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="babelephant demo-corpus"):
        TextGroups.read(tmp_path / "none.jsonl.gz", "train")


def test_trainer_writes_a_loadable_checkpoint_and_resumes(tmp_path: Path) -> None:
    options = TrainingOptions(
        corpus=write_corpus(tmp_path / "texts.jsonl.gz"),
        tokenizer=CHECKPOINT,
        out=tmp_path / "out",
        total_seconds=3.0,
        run_seconds=1.5,
        rows=2,
        num_variants=2,
        device="cpu",
        pool_pairs=3000,
        validate_every_s=1.0,
    )
    config = small_config(12032)
    first = Trainer(options, config).run()
    assert first["step"] > 0 and {"nll", "valid_interface_nll", "valid_cldr_accuracy", "expert_load_max"} <= first.keys()
    trainer = Trainer(replace(options, run_seconds=None), config)
    assert trainer.num_steps == first["step"]
    last = trainer.run()
    assert last["step"] > first["step"] and last["elapsed_s"] >= 3.0
    lines = (options.out / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == sorted(json.loads(line)["step"] for line in lines)
    written = json.loads((options.out / "checkpoint" / "config.json").read_text())
    assert ModelConfig.from_dict(written) == config
    # only weights came along: the schedule starts anew from them
    (options.out / "state.pt").unlink()
    assert Trainer(options, config).num_steps == 0


def test_shipped_model_has_the_documented_shape() -> None:
    config = ModelConfig.from_checkpoint(CHECKPOINT)
    assert config == demo_model_config(12032)
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 32_000_000
