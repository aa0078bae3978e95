"""A log of what was asked for, read for demand by pair and for lengths.

A CSV in the order of time, a row a sentence or a sum of several: `time_s, src_lang, tgt_lang, source_chars`, and where
known `sentences` (1), `source_tokens`, `target_tokens`. Rows without tokens, such as refused sentences, are demand from
which no lengths are learnt. What is kept while reading is a number for each pair and minute.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from app.cost.lengths import PairLengths, PairTraffic
from app.cost.traces import Floats
from app.cost.traffic import PairDemand, Traffic, TrafficError

WINDOW_S = 60
COLUMNS = ("time_s", "src_lang", "tgt_lang", "source_chars")


def read_log(path: Path, lengths: PairLengths, name_of: Callable[[str], str], quantile: float = 0.99) -> Traffic:
    """Demand by pair over the time that a log covers; what it says about lengths is learnt in passing.

    name_of: a language's one name (codes come in several spellings), ValueError for an unknown one. peak_per_s is this
    quantile of the rates of whole minutes. Raises TrafficError naming the line, OSError.
    """
    if not 0 < quantile < 1:
        raise TrafficError(f"the quantile is {quantile}; it must be between 0 and 1")
    first: int | None = None
    counts: dict[str, dict[int, float]] = {}
    totals: dict[str, Floats] = {}
    minute = 0
    for minute, pairs in _minutes(_rows(path, name_of)):
        first = minute if first is None else first
        for pair, sums in pairs.items():
            counts.setdefault(pair, {})[minute - first] = float(sums[0])
            totals[pair] = totals[pair] + sums if pair in totals else sums
        lengths.observe(
            float(minute * WINDOW_S), {pair: PairTraffic(*sums[2:].tolist()) for pair, sums in pairs.items() if sums[2] > 0}
        )
    if first is None:
        raise TrafficError(f"{path}: holds no rows")
    rates = np.zeros((minute - first + 1, len(counts)))
    for column, by_minute in enumerate(counts.values()):
        rates[list(by_minute), column] = np.array(list(by_minute.values())) / WINDOW_S
    mean = rates.mean(0)
    peak = np.maximum(np.quantile(rates, quantile, axis=0), mean)
    demands = [
        PairDemand(pair, float(peak[i]), float(mean[i]), float(total[1] / total[0]))
        for i, (pair, total) in enumerate(totals.items())
    ]
    demands.sort(key=lambda demand: -demand.mean_per_s * demand.source_chars)
    if lengths.pairs:
        demands = [demand.with_tokens(lengths) for demand in demands]
    return Traffic(tuple(demands), correlation(rates))


def correlation(rates: Floats) -> float:
    """Mean correlation of the columns of rates float64[M, P], each pair of columns weighted by its standard deviations; that
    which gives their sum its variance. 0 to 1.
    """
    deviations = rates.std(0)
    own = (deviations**2).sum()
    mixed = deviations.sum() ** 2 - own
    return float(np.clip((rates.sum(1).var() - own) / mixed, 0, 1)) if mixed > 0 else 0.0


_Row = tuple[int, str, Floats]


def _rows(path: Path, name_of: Callable[[str], str]) -> Iterator[_Row]:
    """(minute, pair, float64[5]: sentences, characters, and of rows with tokens characters, source and target tokens)."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise TrafficError(f"{path}: no column {', '.join(missing)}; the first line names {', '.join(COLUMNS)}")
        names: dict[str, str] = {}
        for row in reader:
            try:
                for code in (row["src_lang"], row["tgt_lang"]):
                    if code not in names:
                        names[code] = name_of(code)
                yield _row(row, f"{names[row['src_lang']]}-{names[row['tgt_lang']]}")
            except (TypeError, ValueError) as error:
                raise TrafficError(f"{path}, line {reader.line_num}: {error}") from error


def _row(row: Mapping[str, str], pair: str) -> _Row:
    sentences, source_tokens, target_tokens = (
        float(row.get(name) or default) for name, default in (("sentences", 1), ("source_tokens", 0), ("target_tokens", 0))
    )
    chars = float(row["source_chars"])
    known = (chars, source_tokens, target_tokens) if source_tokens and target_tokens else (0.0, 0.0, 0.0)
    values = np.array([sentences, chars, *known])
    if not (np.isfinite(values).all() and sentences > 0 and chars > 0 and values.min() >= 0):
        raise ValueError("sentences and source_chars must be positive numbers, tokens at least 0")
    return int(float(row["time_s"]) // WINDOW_S), pair, values


def _minutes(rows: Iterable[_Row]) -> Iterator[tuple[int, dict[str, Floats]]]:
    """Sums by pair, minute after minute."""
    now: int | None = None
    pairs: dict[str, Floats] = {}
    for minute, pair, values in rows:
        if now is not None and minute < now:
            raise TrafficError(f"time goes back from minute {now} to {minute}: sort the log by time_s")
        if minute != now:
            if now is not None:
                yield now, pairs
            now, pairs = minute, {}
        pairs[pair] = pairs[pair] + values if pair in pairs else values
    if now is not None:
        yield now, pairs


def table(traffic: Traffic, lengths: PairLengths) -> str:
    """A pair a line: demand, and lengths as seen alone and as learnt."""
    header = f"{'pair':<20} {'mean/s':>9} {'peak/s':>9} {'chars':>7} {'tokens':>13}   {'tokens a char: seen learnt':>26}"
    header += f"   {'ratio: seen learnt':>18}"
    rows = [_table_row(demand, lengths) for demand in traffic.pairs]
    notes = [f"correlation of the pairs' minutes {traffic.correlation:.2f}"]
    if lengths.pairs:
        notes.append("learnt: drawn towards the other pairs of the source language, the more the less was seen")
    return "\n".join([header, *rows, "", *notes])


def _table_row(demand: PairDemand, lengths: PairLengths) -> str:
    start = f"{demand.pair:<20} {demand.mean_per_s:>9.3f} {demand.peak_per_s:>9.3f} {demand.source_chars:>7.1f}"
    if demand.source_tokens is None or demand.target_tokens is None or not lengths.pairs:
        return f"{start} {'not known':>13}"
    found = lengths.estimate(demand.pair)
    seen = lengths.raw(demand.pair) if demand.pair in lengths.pairs else None
    fertility, ratio = (f"{seen[0]:.3f}", f"{seen[1]:.3f}") if seen else ("-", "-")
    tokens = f"{demand.source_tokens:.1f} > {demand.target_tokens:.1f}"
    return f"{start} {tokens:>13}   {fertility:>19} {found.fertility:>6.3f}   {ratio:>11} {found.length_ratio:>6.3f}"
