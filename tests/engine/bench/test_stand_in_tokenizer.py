"""The stand-in tokenizer beside the demonstration model's own."""

from __future__ import annotations

from pathlib import Path

from engine.bench.stand_in_tokenizer import write_stand_in_tokenizer
from engine.tokenizer import Tokenizer

DEMO = Path("engine/demo/checkpoint")


def test_texts_are_those_ids_and_every_id_is_a_word(tmp_path: Path) -> None:
    assert write_stand_in_tokenizer(tmp_path, 12_500)
    ours, demo = Tokenizer.from_checkpoint(tmp_path), Tokenizer.from_checkpoint(DEMO)
    assert (ours.num_ids, ours.languages, ours.eos_token_id) == (12_500, demo.languages, demo.eos_token_id)
    for text in ("Datei öffnen", "fra_Latn w12099 <s>", "保存しますか?", "\U0001f418 3.5"):
        for language in ("deu_Latn", "jpn_Jpan"):
            ids = ours.encode(text, language)
            assert ids.tolist() == demo.encode(text, language).tolist()
            assert ours.decode(ids) == demo.decode(ids)
    assert ours.decode([12_032, 12_499]) == "w12032 w12499"
    assert all(ours.decode([token_id]) for token_id in range(12_032, 12_500))


def test_a_smaller_vocabulary_than_the_demonstration_model_has_gets_none(tmp_path: Path) -> None:
    assert not write_stand_in_tokenizer(tmp_path, 12_031)
    assert list(tmp_path.iterdir()) == []
