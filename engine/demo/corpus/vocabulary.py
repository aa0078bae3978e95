"""Trains the shared vocabulary (BPE with byte fallback) and saves it in NLLB's tokenizer format."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from engine.demo.corpus.groups import Group, is_interface
from engine.demo.corpus.languages import LANGUAGES

TOTAL_IDS: Final = 12_032  # largest id + 1: pieces, fairseq offset, mask and language codes
_PIECES: Final = TOTAL_IDS - 1 - 1 - len(LANGUAGES)
_CHARACTER_COVERAGE: Final = 0.9995
MAX_MODEL_BYTES: Final = 400_000
# Characters a language may give to the training of the vocabulary: a Chinese character says more than a Latin one.
_CHARACTER_BUDGET: Final = 1_300_000
_TEMPERATURE: Final = 0.5
# Only spaces are normalised (to the plain one, as in the corpus); NFKC would turn "…" and "：" into other signs.
_SPACE_RULES: Final = ("9", "A", "D", "A0", "2002", "2003", "2009", "200A", "202F", "205F", "3000")


def training_sample(groups: Iterable[Group], *, seed: int) -> list[str]:
    """Train texts for the vocabulary: each language gives characters by its share to the power of 1/2."""
    by_tag: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        if group.split == "train":
            for tag, text in group.texts.items():
                # Phrases are many and alike: a sixth of them is plenty.
                if is_interface(group) or len(text) % 6 == 0:
                    by_tag[tag].append(text)
    rng = random.Random(seed)
    sizes = {tag: sum(map(len, by_tag[tag])) for tag in LANGUAGES}
    largest = max(sizes.values())
    sample: list[str] = []
    for tag in LANGUAGES:
        texts = by_tag[tag]
        rng.shuffle(texts)
        budget = _CHARACTER_BUDGET * (sizes[tag] / largest) ** _TEMPERATURE
        for text in texts:
            if budget <= 0:
                break
            sample.append(text)
            budget -= len(text)
    return sample


def train_pieces(sample: list[str], folder: Path) -> Path:
    """Trains the SentencePiece model with ids in the order that NLLB's offset rule assumes."""
    try:
        import sentencepiece
    except ImportError as error:
        raise RuntimeError("sentencepiece trains the vocabulary: pip install 'babelephant[demo]'") from error
    rules = folder / "spaces.tsv"
    rules.write_text("".join(f"{code}\t20\n" for code in _SPACE_RULES), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_prefix=str(folder / "pieces"),
        model_type="bpe",
        vocab_size=_PIECES,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        split_digits=True,
        character_coverage=_CHARACTER_COVERAGE,
        normalization_rule_tsv=str(rules),
        remove_extra_whitespaces=True,
        max_sentence_length=8192,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "pieces.model"


def save_tokenizer(model: Path, checkpoint: Path) -> None:
    """Converts with transformers, then turns byte fallback on, which the conversion forgets."""
    try:
        from transformers import NllbTokenizerFast
    except ImportError as error:
        raise RuntimeError("transformers converts the vocabulary: pip install 'babelephant[demo]'") from error
    checkpoint.mkdir(parents=True, exist_ok=True)
    vocab_file = checkpoint / "sentencepiece.bpe.model"
    vocab_file.write_bytes(model.read_bytes())
    tokenizer_class: Any = NllbTokenizerFast
    tokenizer = tokenizer_class(
        vocab_file=str(vocab_file),
        src_lang="eng_Latn",
        tgt_lang="fra_Latn",
        additional_special_tokens=list(LANGUAGES),
        clean_up_tokenization_spaces=False,  # would eat the space before a French "!"
        model_max_length=512,
    )
    tokenizer.save_pretrained(str(checkpoint))
    if vocab_file.stat().st_size > MAX_MODEL_BYTES:  # tokenizer.json has everything
        vocab_file.unlink()
    path = checkpoint / "tokenizer.json"
    spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    spec["model"]["byte_fallback"] = True
    spec["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, spec["decoder"]]}
    path.write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
