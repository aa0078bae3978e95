from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.routing import ANY, LanguagePair, Router, RoutingError, UnsupportedPairError, parse_pattern

CODES = ["eng_Latn", "deu_Latn", "jpn_Jpan", "zho_Hans"]


@pytest.mark.parametrize(
    ("pattern", "src", "tgt"),
    [
        ("en-de", "eng_Latn", "deu_Latn"),
        ("*-ja", ANY, "jpn_Jpan"),
        ("zh-Hans-*", "zho_Hans", ANY),
        ("en-zh-Hant", "eng_Latn", "zho_Hant"),
        ("pt-BR-zh-Hans", "por_Latn", "zho_Hans"),
        ("eng_Latn-deu_Latn", "eng_Latn", "deu_Latn"),
        ("zh-Hans > pt-BR", "zho_Hans", "por_Latn"),
        ("*-*", ANY, ANY),
    ],
)
def test_patterns(pattern: str, src: str, tgt: str) -> None:
    assert parse_pattern(pattern) == LanguagePair(src, tgt)


@pytest.mark.parametrize("pattern", ["", "*", "en", "en-xx", "en_de", "en->de", "*-", "e*-de", "en-de-fr"])
def test_bad_patterns_are_errors_that_name_the_pattern(pattern: str) -> None:
    with pytest.raises(RoutingError) as error:
        parse_pattern(pattern)
    assert repr(pattern) in str(error.value)


def test_most_specific_pattern_wins() -> None:
    router = Router({"rest": ["*-*"], "from_en": ["en-*"], "pair": ["en-de"], "to_ja": ["*-ja"], "tie": ["en-ja"]})
    for src, tgt, pool in [("eng", "deu", "pair"), ("eng", "fra", "from_en"), ("deu", "fra", "rest")]:
        assert router.route(LanguagePair(f"{src}_Latn", f"{tgt}_Latn")) == pool
    assert router.route(LanguagePair("eng_Latn", "jpn_Jpan")) == "tie"
    assert router.route(LanguagePair("deu_Latn", "jpn_Jpan")) == "to_ja"


def test_ties_are_configuration_errors() -> None:
    with pytest.raises(RoutingError, match="both claim eng_Latn-deu_Latn"):
        Router({"a": ["en-de"], "b": ["eng_Latn>deu_Latn"]})
    with pytest.raises(RoutingError, match=r"both claim eng_Latn-jpn_Jpan.*add eng_Latn-jpn_Jpan"):
        Router({"a": ["en-*"], "b": ["*-ja"]})
    assert Router({"a": ["en-*", "*-ja"]}).route(LanguagePair("eng_Latn", "jpn_Jpan")) == "a"


def test_unknown_pair_lists_what_is_supported() -> None:
    with pytest.raises(UnsupportedPairError) as error:
        Router({"a": ["en-de", "*-ja"]}).route(LanguagePair("deu_Latn", "eng_Latn"))
    assert error.value.supported == ("*-jpn_Jpan", "eng_Latn-deu_Latn")


sides = st.sampled_from([ANY, *CODES])
patterns = st.dictionaries(st.tuples(sides, sides), st.sampled_from(["a", "b", "c"]), max_size=8)


@given(patterns, st.sampled_from(CODES), st.sampled_from(CODES))
def test_route_agrees_with_a_brute_force_search(owners: dict[tuple[str, str], str], src: str, tgt: str) -> None:
    """Independent statement of the rule: among matching patterns those with the fewest stars; one owner or an error."""
    by_pool: dict[str, list[str]] = {}
    for (left, right), pool in owners.items():
        by_pool.setdefault(pool, []).append(f"{left}>{right}")

    def candidates(pair: tuple[str, str]) -> set[str]:
        matching = [p for p in owners if all(side in (ANY, code) for side, code in zip(p, pair, strict=True))]
        fewest = min((p.count(ANY) for p in matching), default=0)
        return {owners[p] for p in matching if p.count(ANY) == fewest}

    try:
        router = Router(by_pool)
    except RoutingError:
        assert any(len(candidates((s, t))) > 1 for s in CODES for t in CODES if s != t)
        return
    assume(src != tgt)
    assert len(candidates((src, tgt))) <= 1
    try:
        assert {router.route(LanguagePair(src, tgt))} == candidates((src, tgt))
    except UnsupportedPairError:
        assert not candidates((src, tgt))
