"""Which pool translates a language pair: pure, decided from configuration alone.

A pattern is `source-target`, each side a language code or `*`: `en-de`, `*-ja`, `zh-Hans-*`,
`eng_Latn>deu_Latn`. The pattern with more named languages wins. Two pools that claim a pair with equal right are a
configuration error, found when the router is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from app.text.languages import UnknownLanguageError, resolve_language

ANY = "*"


class RoutingError(ValueError):
    """Pair patterns that cannot be parsed or that contradict each other."""


class UnsupportedPairError(LookupError):
    """No pool claims the pair; `supported` lists the configured patterns."""

    def __init__(self, pair: LanguagePair, supported: tuple[str, ...]) -> None:
        super().__init__(f"no pool translates {pair.src_lang} to {pair.tgt_lang}; configured pairs: {', '.join(supported)}")
        self.pair = pair
        self.supported = supported


@dataclass(frozen=True, slots=True, order=True)
class LanguagePair:
    """FLORES-200 codes; in a pattern either side may be ANY."""

    src_lang: str
    tgt_lang: str

    @property
    def num_named(self) -> int:
        """How many sides name a language: the specificity of a pattern."""
        return (self.src_lang != ANY) + (self.tgt_lang != ANY)

    def __str__(self) -> str:
        return f"{self.src_lang}-{self.tgt_lang}"


def parse_pattern(pattern: str) -> LanguagePair:
    """Parse `source-target` or `source>target`. Raises RoutingError when no reading, or more than one, is possible."""
    separator = ">" if ">" in pattern else "-"
    parts = pattern.split(separator)
    readings: set[LanguagePair] = set()
    for cut in range(1, len(parts)):
        try:
            readings.add(LanguagePair(_side(separator.join(parts[:cut])), _side(separator.join(parts[cut:]))))
        except UnknownLanguageError:
            continue  # another place to cut may read well: codes contain hyphens too
    if len(readings) == 1:
        return readings.pop()
    problem = "can be read in more than one way" if readings else "names no known language pair"
    raise RoutingError(f"pair {pattern!r} {problem}; write source-target as en-de, *-ja, en-* or eng_Latn>zho_Hans")


def _side(code: str) -> str:
    code = code.strip()
    return ANY if code == ANY else resolve_language(code).flores


class Router:
    """Pool names by pattern. Raises RoutingError on creation when two pools claim a pair with equal right."""

    def __init__(self, patterns_by_pool: Mapping[str, Iterable[str]]) -> None:
        self._pools: dict[LanguagePair, str] = {}
        for pool, patterns in patterns_by_pool.items():
            for pattern in map(parse_pattern, patterns):
                owner = self._pools.setdefault(pattern, pool)
                if owner != pool:
                    raise RoutingError(f"pools {owner!r} and {pool!r} both claim {pattern}; remove it from one of them")
        self._refuse_crossings()

    def _refuse_crossings(self) -> None:
        """`en-*` of one pool and `*-ja` of another cross in en-ja, which then has to be named itself."""
        sources = {p.src_lang: pool for p, pool in self._pools.items() if p.num_named == 1 and p.tgt_lang == ANY}
        targets = {p.tgt_lang: pool for p, pool in self._pools.items() if p.num_named == 1 and p.src_lang == ANY}
        for src_lang, src_pool in sources.items():
            for tgt_lang, tgt_pool in targets.items():
                pair = LanguagePair(src_lang, tgt_lang)
                if src_pool != tgt_pool and src_lang != tgt_lang and pair not in self._pools:
                    raise RoutingError(
                        f"pools {src_pool!r} ({src_lang}-*) and {tgt_pool!r} (*-{tgt_lang}) both claim {pair}; "
                        f"add {pair} to the one that should translate it"
                    )

    @property
    def patterns(self) -> tuple[str, ...]:
        """All configured patterns in FLORES-200 codes, sorted."""
        return tuple(str(pattern) for pattern in sorted(self._pools))

    def route(self, pair: LanguagePair) -> str:
        """Name of the pool for a pair of two languages. Raises UnsupportedPairError."""
        for pattern in (
            pair,
            LanguagePair(pair.src_lang, ANY),
            LanguagePair(ANY, pair.tgt_lang),
            LanguagePair(ANY, ANY),
        ):
            if (pool := self._pools.get(pattern)) is not None:
                return pool
        raise UnsupportedPairError(pair, self.patterns)
