"""Quality of a translator on the held-out texts that ship with the project: chrF, BLEU, exact match, marks kept.

chrF and BLEU are corpus scores of sacrebleu (its signatures are kept with the figures). BLEU tokenizes Chinese with `zh`,
Japanese and Korean by characters, everything else with `13a`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tqdm import tqdm

from engine.demo.corpus.marks import marks_of, same_marks
from engine.translator import Translator
from engine.types import SearchOptions

Part = Literal["interface", "cldr"]
PARTS: tuple[Part, Part] = ("interface", "cldr")
HELDOUT = Path(__file__).with_name("heldout.jsonl.gz")
PIVOT = "eng_Latn"
_BLEU_TOKENIZER = {"zho_Hans": "zh", "jpn_Jpan": "char", "kor_Hang": "char"}


@dataclass(frozen=True, slots=True)
class DirectionScore:
    """Scores of one direction on one part. chrf, bleu: 0-100; exact, marks_kept: shares of 1 (marks_kept among sources that
    hold a placeholder, tag or other mark; None where none does).
    """

    src_lang: str
    tgt_lang: str
    part: Part
    num_sentences: int
    chrf: float
    bleu: float
    exact: float
    marks_kept: float | None


def read_heldout(path: Path = HELDOUT) -> list[dict[str, Any]]:
    """Groups as written by the corpus builder: id, kind, source, texts {language: text}."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def directions_of(languages: Iterable[str], *, pivot_only: bool) -> list[tuple[str, str]]:
    """All ordered pairs, or those with English on one side."""
    codes = list(languages)
    return [(s, t) for s in codes for t in codes if s != t and (not pivot_only or PIVOT in (s, t))]


def score_direction(
    translator: Translator,
    groups: Sequence[dict[str, Any]],
    direction: tuple[str, str],
    part: Part,
    *,
    limit: int,
    search: SearchOptions,
) -> DirectionScore | None:
    """Translate at most `limit` held-out texts of one direction and score them; None where the direction has none."""
    import sacrebleu

    src_lang, tgt_lang = direction
    pairs = [
        (texts[src_lang], texts[tgt_lang])
        for group in groups
        if (group["kind"] == "interface") == (part == "interface")
        and src_lang in (texts := group["texts"])
        and tgt_lang in texts
    ][:limit]
    if not pairs:
        return None
    sources, references = (list(side) for side in zip(*pairs, strict=True))
    outputs = [result.text for result in translator.translate(sources, src_lang=src_lang, tgt_lang=tgt_lang, search=search)]
    marked = [same_marks(s, o) for s, o in zip(sources, outputs, strict=True) if marks_of(s)]
    tokenizer = _BLEU_TOKENIZER.get(tgt_lang, "13a")
    return DirectionScore(
        src_lang,
        tgt_lang,
        part,
        len(pairs),
        chrf=sacrebleu.corpus_chrf(outputs, [references]).score,
        bleu=sacrebleu.corpus_bleu(outputs, [references], tokenize=tokenizer).score,
        exact=fmean(o == r for o, r in zip(outputs, references, strict=True)),
        marks_kept=fmean(marked) if marked else None,
    )


def evaluate(
    translator: Translator,
    directions: Sequence[tuple[str, str]],
    *,
    limits: dict[Part, int],
    search: SearchOptions,
    label: str = "",
) -> list[DirectionScore]:
    """Scores of all directions and parts, with a progress bar."""
    groups = read_heldout()
    scores = []
    for direction in tqdm(directions, desc=f"evaluate {label}".strip(), unit="direction"):
        for part in PARTS:
            score = score_direction(translator, groups, direction, part, limit=limits[part], search=search)
            if score is not None:
                scores.append(score)
    return scores


def summarize(scores: Sequence[DirectionScore]) -> dict[str, dict[str, float]]:
    """Means over directions, per part: chrf, bleu, exact, worst_chrf, worst_exact, marks_kept, directions, sentences."""
    summary: dict[str, dict[str, float]] = {}
    for part in PARTS:
        chosen = [score for score in scores if score.part == part]
        if not chosen:
            continue
        marks = [score.marks_kept for score in chosen if score.marks_kept is not None]
        summary[part] = {
            "directions": len(chosen),
            "sentences": sum(score.num_sentences for score in chosen),
            "chrf": fmean(score.chrf for score in chosen),
            "worst_chrf": min(score.chrf for score in chosen),
            "bleu": fmean(score.bleu for score in chosen),
            "exact": fmean(score.exact for score in chosen),
            "worst_exact": min(score.exact for score in chosen),
            **({"marks_kept": fmean(marks)} if marks else {}),
        }
    return summary


def report(scores: dict[str, list[DirectionScore]], search: SearchOptions) -> dict[str, Any]:
    """Everything that belongs with the figures, as plain data: summaries, signatures, search options, all directions."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    metrics = {"chrf": CHRF(), **{f"bleu {t}": BLEU(tokenize=t) for t in ("13a", "zh", "char")}}
    for metric in metrics.values():
        metric.corpus_score(["x"], [["x"]])
    both = {name: [s for s in found if PIVOT in (s.src_lang, s.tgt_lang)] for name, found in scores.items()}
    return {
        "search": asdict(search),
        "signatures": {name: str(metric.get_signature()) for name, metric in metrics.items()},
        "with_english": {name: summarize(found) for name, found in both.items()},
        "all_directions": {name: summarize(found) for name, found in scores.items()},
        "directions": {name: [asdict(score) for score in found] for name, found in scores.items()},
    }


def table(summaries: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown table of summaries by precision."""
    rows = [
        "| experts | interface chrF (worst) | BLEU | exact | marks kept | CLDR exact (worst) | CLDR chrF |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, parts in summaries.items():
        interface, cldr = parts["interface"], parts["cldr"]
        rows.append(
            f"| {name} | {interface['chrf']:.2f} ({interface['worst_chrf']:.1f}) | {interface['bleu']:.2f} "
            f"| {interface['exact']:.1%} | {interface.get('marks_kept', 1.0):.1%} "
            f"| {cldr['exact']:.1%} ({cldr['worst_exact']:.1%}) | {cldr['chrf']:.2f} |"
        )
    return "\n".join(rows)
