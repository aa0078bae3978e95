"""A log read minute by minute, against the same figures counted from its rows; files of pairs; the command."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from app.cli import main
from app.cost.lengths import LengthsError, PairLengths
from app.cost.traffic import PairDemand, Traffic, TrafficError
from app.cost.traffic_log import correlation, read_log
from app.text.languages import resolve_language

Row = dict[str, object]


def rows(seed: int, minutes: int = 90) -> list[Row]:
    """Sentences of four pairs in two spellings, some of them sums, some refused; one pair is asked for twice only."""
    rng = np.random.default_rng(seed)
    made: list[Row] = []
    for second in np.sort(rng.uniform(0, 60 * minutes, 3000)):
        source, target = [("en", "de"), ("eng_Latn", "deu_Latn"), ("de", "en"), ("en", "ja")][int(rng.integers(4))]
        count = int(rng.choice([1, 1, 1, 7]))
        chars = count * int(rng.integers(4, 200))
        row: Row = {"time_s": 1.7e9 + second, "src_lang": source, "tgt_lang": target, "source_chars": chars}
        row["sentences"] = count if count > 1 else ""
        if rng.random() < 0.9:
            row["source_tokens"] = max(1, round(chars * (0.28 if source[0] == "e" else 0.33) * rng.lognormal(0, 0.2)))
            row["target_tokens"] = max(1, round(row["source_tokens"] * rng.lognormal(0.1, 0.2)))
        made.append(row)
    for index in (700, 2900):
        made[index] |= {"src_lang": "fr", "tgt_lang": "zh-Hans"}
    return made


def write(path: Path, made: list[Row]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["time_s", "src_lang", "tgt_lang", "source_chars", "sentences", "source_tokens", "target_tokens"]
    )
    writer.writeheader()
    writer.writerows(made)
    path.write_text(text.getvalue())
    return path


def name_of(code: str) -> str:
    return resolve_language(code).flores


def test_demand_is_that_of_the_rows(tmp_path: Path) -> None:
    made = rows(1)
    lengths = PairLengths()
    traffic = read_log(write(tmp_path / "log.csv", made), lengths, name_of, quantile=0.9)
    assert {demand.pair for demand in traffic.pairs} == {
        "eng_Latn-deu_Latn", "deu_Latn-eng_Latn", "eng_Latn-jpn_Jpan", "fra_Latn-zho_Hans"
    }  # fmt: skip
    minutes = [int(float(row["time_s"]) // 60) for row in made]  # type: ignore[arg-type]
    by_pair = []
    for demand in traffic.pairs:
        mine = [
            (minute, int(row["sentences"] or 1), row)  # type: ignore[call-overload]
            for minute, row in zip(minutes, made, strict=True)
            if f"{name_of(str(row['src_lang']))}-{name_of(str(row['tgt_lang']))}" == demand.pair
        ]
        rates = [sum(n for m, n, _ in mine if m == minute) / 60 for minute in range(minutes[0], minutes[-1] + 1)]
        by_pair.append(rates)
        assert demand.mean_per_s == pytest.approx(np.mean(rates))
        assert demand.peak_per_s == pytest.approx(max(np.quantile(rates, 0.9), np.mean(rates)))
        assert demand.source_chars == pytest.approx(
            sum(int(row["source_chars"]) for *_, row in mine) / sum(n for _, n, _ in mine)  # type: ignore[call-overload]
        )
        known = [row for *_, row in mine if row.get("source_tokens")]
        raw = sum(int(row["source_tokens"]) for row in known) / sum(int(row["source_chars"]) for row in known)  # type: ignore[call-overload]
        assert lengths.raw(demand.pair)[0] == pytest.approx(raw)
        expected = lengths.estimate(demand.pair).tokens(demand.source_chars)
        assert (demand.source_tokens, demand.target_tokens) == pytest.approx(expected)
    covariance = np.cov(by_pair, bias=True)
    apart = ~np.eye(len(by_pair), dtype=bool)
    deviations = np.sqrt(np.diag(covariance))
    mixed = np.outer(deviations, deviations)[apart].sum()
    assert traffic.correlation == pytest.approx(np.clip(covariance[apart].sum() / mixed, 0, 1))


def test_correlation_of_rates_made_to_have_it() -> None:
    rng = np.random.default_rng(2)
    for wanted in (0.0, 0.3, 0.8):
        shared, own = rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 12))
        rates = (np.sqrt(wanted) * shared + np.sqrt(1 - wanted) * own) * rng.uniform(1, 9, 12) + 50
        assert correlation(rates) == pytest.approx(wanted, abs=0.03)
    assert correlation(rng.uniform(size=(50, 1))) == 0.0


def test_without_tokens_there_is_demand_and_no_length(tmp_path: Path) -> None:
    made = [{**row, "source_tokens": "", "target_tokens": ""} for row in rows(3)]
    lengths = PairLengths()
    traffic = read_log(write(tmp_path / "log.csv", made), lengths, name_of)
    assert lengths.pairs == ()
    assert all(demand.source_tokens is None for demand in traffic.pairs)
    with pytest.raises(LengthsError, match="no translation"):
        traffic.pairs[0].with_tokens(lengths)


def test_pairs_come_back_from_their_file(tmp_path: Path) -> None:
    traffic = read_log(write(tmp_path / "log.csv", rows(4)), PairLengths(), name_of)
    traffic.save(tmp_path / "pairs.yaml")
    again = Traffic.read(tmp_path / "pairs.yaml")
    assert again.correlation == pytest.approx(traffic.correlation, abs=1e-3)
    for one, other in zip(traffic.pairs, again.pairs, strict=True):
        assert (one.pair, one.peak_per_s, one.target_tokens) == (
            other.pair, pytest.approx(other.peak_per_s, rel=1e-5), pytest.approx(other.target_tokens, rel=1e-5)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_s,src_lang\n", "no column tgt_lang, source_chars"),
        ("time_s,src_lang,tgt_lang,source_chars\n", "holds no rows"),
        ("time_s,src_lang,tgt_lang,source_chars\n60,en,de,9\n5,en,de,9\n", "sort the log"),
        ("time_s,src_lang,tgt_lang,source_chars\n60,en,de,9\n61,en,tlh,9\n", "line 3: 'tlh'"),
        ("time_s,src_lang,tgt_lang,source_chars\n60,en,de,0\n", "line 2: sentences"),
        ("time_s,src_lang,tgt_lang,source_chars\n60,en,de,x\n", "line 2: could not convert"),
        ("time_s,src_lang,tgt_lang,source_chars\n60,en\n", "line 2"),
    ],
)
def test_bad_logs_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(TrafficError, match=message):
        read_log(path, PairLengths(), name_of)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be `pairs:`"),
        ("{pairs: [], correlation: 0.1}", "no pairs"),
        ("{pairs: [{pair: a-b}]}", "pair 1"),
        ("{pairs: [{pair: a-b, peak_per_s: 1, mean_per_s: 2, source_chars: 3}]}", "above peak_per_s"),
        ("{pairs: [{pair: a-b, peak_per_s: no, mean_per_s: 2, source_chars: 3}]}", "peak_per_s is False"),
        ("{pairs: [{pair: a-b, peak_per_s: 2, mean_per_s: 1, source_chars: 3}], correlation: 7}", "correlation is 7"),
    ],
)
def test_bad_pairs_name_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.yaml"
    path.write_text(text)
    with pytest.raises(TrafficError, match=message):
        Traffic.read(path)
    with pytest.raises(TrafficError, match="twice"):
        Traffic((PairDemand("a-b", 2, 1, 9), PairDemand("a-b", 2, 1, 9)), 0.2)


def test_the_command_learns_from_one_log_to_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, learnt = write(tmp_path / "1.csv", rows(5)), write(tmp_path / "2.csv", rows(6)), tmp_path / "lengths.json"
    pairs = tmp_path / "pairs.yaml"
    assert main(["demand", str(one), "--lengths", str(learnt), "--half-life", "30"]) == 0
    once = PairLengths.load(learnt).estimate("eng_Latn-deu_Latn").seen_chars
    assert main(["demand", str(two), "--lengths", str(learnt), "--out", str(pairs)]) == 0
    assert PairLengths.load(learnt).estimate("eng_Latn-deu_Latn").seen_chars > 1.7 * once
    assert len(Traffic.read(pairs).pairs) == 4
    printed = capsys.readouterr().out
    assert "fra_Latn-zho_Hans" in printed
    assert main(["demand", str(tmp_path / "none.csv")]) == 2
    assert main(["demand", str(one), "--lengths", str(learnt), "--half-life", "3"]) == 2
    assert main(["demand", str(one), "--quantile", "1"]) == 2
    assert "half-life already" in capsys.readouterr().err
