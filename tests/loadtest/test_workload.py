"""Workload files and the requests drawn from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from loadtest.errors import LoadTestError
from loadtest.workload import WORKLOADS, load_workload, shipped_workloads


@pytest.mark.parametrize("name", shipped_workloads())
def test_shipped_workloads_draw_sound_requests(name):
    loaded = load_workload(name)
    for planned in loaded.draw(200, 3):
        body = json.loads(planned.body)
        pair = loaded.workload.pairs[planned.pair_index]
        assert (body["source_lang"], body["target_lang"]) == (pair.source_lang, pair.target_lang)
        assert len(body["texts"]) == planned.num_texts
        assert sum(map(len, body["texts"])) == planned.source_chars
        assert all(text.strip() and "{n}" not in text for text in body["texts"])


def test_shipped_are_the_yaml_files_of_the_folder():
    assert shipped_workloads() == ["documents", "interface", "single"]


def test_the_mix_follows_the_weights():
    loaded, count = load_workload("interface"), 4000
    drawn = loaded.draw(count, 5)
    total_weight = sum(pair.weight for pair in loaded.workload.pairs)
    for index, pair in enumerate(loaded.workload.pairs):
        share = pair.weight / total_weight
        seen = sum(planned.pair_index == index for planned in drawn)
        assert abs(seen - count * share) < 4 * math.sqrt(count * share * (1 - share))
    sizes = np.array([planned.num_texts for planned in drawn])
    assert abs(np.mean(sizes == 4) - 0.22) < 4 * math.sqrt(0.22 * 0.78 / count)


def test_lengths_follow_the_distribution_asked_for():
    """Texts are whole sentences, so lengths come near the lognormal, not onto it."""
    loaded = load_workload("documents")
    wanted = loaded.workload.characters
    lengths = [len(text) for planned in loaded.draw(400, 2) for text in json.loads(planned.body)["texts"]]
    assert np.median(lengths) == pytest.approx(wanted.median, rel=0.15)
    assert np.std(np.log(lengths)) == pytest.approx(wanted.sigma, rel=0.25)
    assert max(lengths) < wanted.max * 1.1


def test_one_seed_gives_one_set_of_requests_and_most_texts_differ():
    loaded = load_workload("interface")
    assert loaded.draw(300, 4) == loaded.draw(300, 4)
    assert loaded.draw(300, 4) != loaded.draw(300, 5)
    bodies = [planned.body for planned in loaded.draw(1000, 1)]
    assert len(set(bodies)) > 700


def workload_file(folder: Path, **changes: object) -> str:
    data = {
        "name": "mine",
        "description": "a test",
        "texts": "texts.yaml",
        "slo": {"percentile": 99, "latency_s": 1.0},
        "texts_per_request": {1: 1},
        "characters": {"median": 20, "sigma": 0.5, "min": 1, "max": 90},
        "pairs": [{"source_lang": "eng_Latn", "target_lang": "deu_Latn", "weight": 1}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump({k: v for k, v in {**data, **changes}.items() if v is not None}))
    if not (folder / "texts.yaml").exists():
        (folder / "texts.yaml").write_text("eng_Latn: [Save, Cancel everything now]\nswe_Latn: [yes]\n")
    return str(folder / "mine.yaml")


def test_a_file_of_ones_own_works(tmp_path):
    loaded = load_workload(workload_file(tmp_path, beam_size=2))
    assert json.loads(loaded.draw(1, 1)[0].body)["beam_size"] == 2


PAIR = {"source_lang": "eng_Latn", "target_lang": "deu_Latn", "weight": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairz": []}, "pairz: Extra inputs"),
        ({"pairs": []}, "pairs: .*at least 1"),
        ({"pairs": [PAIR, PAIR]}, "listed twice: eng_Latn-deu_Latn"),
        ({"pairs": [{**PAIR, "weight": 0}]}, r"pairs\.0\.weight: .*greater than 0"),
        ({"pairs": [{**PAIR, "source_lang": "fin_Latn"}]}, "no sentences for source language fin_Latn; it has eng_Latn"),
        ({"pairs": [{**PAIR, "source_lang": "swe_Latn"}]}, "swe_Latn: True is not a sentence; quote it"),
        ({"characters": {"median": 20, "sigma": 0.5, "min": 90, "max": 9}}, "min 90 is above max 9"),
        ({"slo": {"percentile": 100, "latency_s": 1}}, r"slo\.percentile"),
        ({"texts": "nowhere.yaml"}, "texts: no file"),
        ({"slo": None}, "slo: Field required"),
        ({"texts_per_request": {0: 1}}, "texts_per_request"),
    ],
)
def test_bad_files_are_refused_with_field_and_reason(tmp_path, changes, message):
    with pytest.raises(LoadTestError, match=message):
        load_workload(workload_file(tmp_path, **changes))


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(LoadTestError, match="no workload 'interfaze'; shipped: documents, interface, single"):
        load_workload("interfaze")
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    with pytest.raises(LoadTestError, match=r"broken\.yaml"):
        load_workload(str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(LoadTestError, match=r"list\.yaml: file: "):
        load_workload(str(tmp_path / "list.yaml"))
    (tmp_path / "texts.yaml").write_text("- a\n")
    with pytest.raises(LoadTestError, match="expected a mapping"):
        load_workload(workload_file(tmp_path))


def test_sentences_are_ours_and_different():
    data = yaml.safe_load((WORKLOADS / "sentences.yaml").read_text(encoding="utf-8"))
    for sentences in data.values():
        assert len(set(sentences)) == len(sentences) >= 12
