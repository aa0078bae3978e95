"""Translate texts in this process, without a server.

Each argument is one text; without arguments, each line of standard input is one. Translations are printed in order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from app.devices import require_device
from app.precision import default_precision
from app.settings import Environment, PoolSettings
from app.text.languages import resolve_language
from app.text.lines import join_lines, split_lines
from engine.config import PRECISIONS
from engine.types import SearchOptions, Translation

EXAMPLES = """  babelephant translate --from en --to de "Your changes have been saved."
  babelephant translate --from en --to ja --beam-size 1 --json "Open file" "Close file"
  babelephant translate --from fr --to en < texts.txt > translations.txt
  babelephant translate --from en --to de --precision fp32 --checkpoint ~/my-nllb-moe "Hello" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; default: lines of standard input")
    parser.add_argument("--from", dest="source", required=True, metavar="LANG", help="source language: en, pt-BR, eng_Latn")
    parser.add_argument("--to", dest="target", required=True, metavar="LANG", help="target language")
    parser.add_argument("--beam-size", type=int, default=4, metavar="N", help="1 (greedy) to 8; default 4")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the expert weights; default: that of a converted checkpoint, else w8a16"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="NLLB-MoE checkpoint; default: the demo model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; default 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text, with score and token counts")


def run(args: argparse.Namespace) -> int:
    """Translate and print."""
    source, target = resolve_language(args.source).flores, resolve_language(args.target).flores
    if source == target:
        raise ValueError(f"--from and --to are both {source}; choose two languages")
    require_device(args.device)
    search = SearchOptions(beam_size=args.beam_size)
    checkpoint = args.checkpoint.expanduser().resolve() if args.checkpoint else Environment.read().checkpoint
    precision = args.precision or default_precision(checkpoint)
    pool = PoolSettings.model_validate(
        {"precision": precision, "device": args.device, "engine": {"num_threads": args.threads}}
    )
    texts = args.texts or [line.rstrip("\n") for line in sys.stdin]
    for number, text in enumerate(texts, start=1):
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python hands on bytes that it cannot decode
            raise ValueError(f"text {number} is not UTF-8")

    from engine.translator import Translator

    translator = Translator.load(checkpoint, pool.engine_config())
    split = [split_lines(text) for text in texts]
    sentences = [line.sentence for lines in split for line in lines if line.sentence]
    translations = translator.translate(
        sentences, src_lang=source, tgt_lang=target, search=search, progress=len(sentences) > 64
    )
    remaining = iter(translations)
    for text, lines in zip(texts, split, strict=True):
        parts = [next(remaining) for line in lines if line.sentence]
        if failed := [part.error for part in parts if not part.ok]:
            raise ValueError(f"{text!r} did not translate: {failed[0]}")
        translated = join_lines(lines, [part.text for part in parts])
        print(_as_json(text, translated, parts) if args.json else translated)
    return 0


def _as_json(text: str, translated: str, parts: Sequence[Translation]) -> str:
    fields = {
        "text": text,
        "translation": translated,
        "lines": [
            {
                "score": part.score,
                "source_tokens": part.num_source_tokens,
                "target_tokens": part.num_target_tokens,
                "finish_reason": part.finish_reason.value,
            }
            for part in parts
        ],
    }
    return json.dumps(fields, ensure_ascii=False)
