"""Which values the CLDR phrases take: how many of each kind, and over which ranges."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache

from engine.demo.corpus import cldr_phrases as phrases
from engine.demo.corpus.cldr_phrases import DateStyle, MoneyStyle, Phrase
from engine.demo.corpus.cldr_vocabulary import (
    CATEGORIES,
    CURRENCIES,
    FIRST_YEAR,
    LAST_YEAR,
    RELATIVE_UNITS,
    UNITS,
    shared_codes,
)
from engine.demo.corpus.languages import LANGUAGES

# Share of all phrases that are drawn at random; times, relative times and names are counted out on top of them.
_SHARES: dict[str, float] = {
    "date": 0.16,
    "datetime": 0.10,
    "number": 0.14,
    "percent": 0.05,
    "currency": 0.14,
    "unit": 0.17,
    "list": 0.13,
    "mixed": 0.11,
}


@cache
def _unambiguous_currencies(format_type: MoneyStyle) -> tuple[str, ...]:
    """Currencies that look like no other one, in every language."""
    return _without_namesakes(CURRENCIES, lambda code: phrases.currency_phrase(Decimal("5.25"), code, format_type))


@cache
def _rounded_currencies() -> frozenset[str]:
    """Currencies that are written without decimals."""
    from babel.numbers import get_currency_precision

    return frozenset(code for code in CURRENCIES if get_currency_precision(code) == 0)


@cache
def _unambiguous_units() -> tuple[str, ...]:
    return _without_namesakes(UNITS, lambda unit: phrases.unit_phrase(Decimal(25), unit))


def _without_namesakes(members: tuple[str, ...], phrase_of: Callable[[str], Phrase]) -> tuple[str, ...]:
    namesakes = set()
    for tag in LANGUAGES:
        owner: dict[str | None, str] = {}
        for member in members:
            other = owner.setdefault(phrase_of(member).render(tag), member)
            if other != member:
                namesakes.add(member)
    return tuple(member for member in members if member not in namesakes)


def _any_date(rng: random.Random) -> datetime.date:
    recent = rng.random() < 0.7
    first, last = (1990, 2035) if recent else (FIRST_YEAR, LAST_YEAR)
    return datetime.date(first, 1, 1) + datetime.timedelta(days=rng.randrange(365 * (last - first + 1)))


def _any_number(rng: random.Random, *, max_digits: int = 9, max_decimals: int = 3) -> Decimal:
    digits = rng.randint(1, max_digits)
    whole = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    decimals = rng.choice((0, 0, 1, 2, 3)) if digits <= 6 else 0
    decimals = min(decimals, max_decimals)
    if decimals == 0:
        return Decimal(whole)
    # The last digit is never zero: "1.50" would be written "1.5".
    tail = rng.randrange(10 ** (decimals - 1)) * 10 + rng.randint(1, 9)
    return Decimal(whole) + Decimal(tail).scaleb(-decimals)


def _any_amount(rng: random.Random) -> Decimal:
    whole = rng.randrange(1, 10 ** rng.randint(1, 7))
    return Decimal(whole) if rng.random() < 0.3 else Decimal(whole) + Decimal(rng.randrange(100)).scaleb(-2)


def _any_date_phrase(rng: random.Random) -> Phrase:
    style = rng.choices(("full", "long", "yMMMM", "MMMMd"), (40, 40, 14, 6))[0]
    return phrases.date_phrase(_any_date(rng), style)


def _any_datetime_phrase(rng: random.Random) -> Phrase:
    moment = datetime.datetime.combine(_any_date(rng), datetime.time(rng.randrange(24), rng.randrange(60)))
    styles: tuple[DateStyle, ...] = ("full", "long")
    return phrases.datetime_phrase(moment, rng.choice(styles))


def _any_number_phrase(rng: random.Random) -> Phrase:
    if rng.random() < 0.12:
        significant = Decimal(rng.randrange(11, 100)) if rng.random() < 0.7 else Decimal(rng.randrange(1, 10))
        return phrases.compact_phrase(significant * 10 ** rng.randint(5, 10))
    number = _any_number(rng)
    return phrases.number_phrase(-number if rng.random() < 0.05 else number)


def _any_percent_phrase(rng: random.Random) -> Phrase:
    return phrases.percent_phrase(_any_number(rng, max_digits=3, max_decimals=2).scaleb(-2))


def _any_currency_phrase(rng: random.Random) -> Phrase:
    styles: tuple[MoneyStyle, ...] = ("name", "name", "standard")
    style = rng.choice(styles)
    currency, amount = rng.choice(_unambiguous_currencies(style)), _any_amount(rng)
    if currency in _rounded_currencies():  # a hidden fraction would still choose the plural form
        amount = Decimal(int(amount) or 1)
    return phrases.currency_phrase(amount, currency, style)


def _any_unit_phrase(rng: random.Random) -> Phrase:
    number = _any_number(rng, max_digits=rng.choice((1, 2, 2, 3, 5)), max_decimals=1)
    return phrases.unit_phrase(number, rng.choice(_unambiguous_units()))


def _any_name_phrase(rng: random.Random) -> Phrase:
    category = rng.choices(("territory", "language", "currency"), (6, 3, 1))[0]
    return phrases.name_phrase(category, rng.choice(shared_codes(category)))


def _any_list_phrase(rng: random.Random) -> Phrase:
    category = rng.choices(("territory", "language", "currency", "month", "weekday"), (10, 7, 3, 2, 1))[0]
    codes = rng.sample(shared_codes(category), rng.choices((2, 3, 4), (3, 4, 2))[0])
    parts = [phrases.name_phrase(category, code) for code in codes]
    return phrases.list_phrase(parts, "or" if rng.random() < 0.2 else "standard")


def _any_mixed_phrase(rng: random.Random) -> Phrase:
    way = rng.randrange(6)
    if way == 0:
        return phrases.colon_phrase(_any_name_phrase(rng), _any_currency_phrase(rng))
    if way == 1:
        return phrases.colon_phrase(_any_date_phrase(rng), _any_unit_phrase(rng))
    if way == 2:
        return phrases.bracket_phrase(_any_name_phrase(rng), _any_percent_phrase(rng))
    if way == 3:
        return phrases.bracket_phrase(_any_unit_phrase(rng), _any_date_phrase(rng))
    draw = (_any_unit_phrase, _any_currency_phrase, _any_date_phrase, _any_name_phrase)[rng.randrange(4)]
    return phrases.list_phrase([draw(rng), draw(rng)], "or" if way == 4 else "standard", kind="cldr:mixed")


_DRAWS: dict[str, Callable[[random.Random], Phrase]] = {
    "date": _any_date_phrase,
    "datetime": _any_datetime_phrase,
    "number": _any_number_phrase,
    "percent": _any_percent_phrase,
    "currency": _any_currency_phrase,
    "unit": _any_unit_phrase,
    "list": _any_list_phrase,
    "mixed": _any_mixed_phrase,
}


def all_phrases(num_phrases: int, *, seed: int) -> Iterator[Phrase]:
    """Names first (they win conflicts), then what can be counted out, then `num_phrases` drawn ones."""
    for category in CATEGORIES:
        for code in shared_codes(category):
            yield phrases.name_phrase(category, code)
    rng = random.Random(seed)
    for minute in range(24 * 60):
        time = datetime.time(minute // 60, minute % 60)
        yield phrases.time_phrase(time, "short")
        yield phrases.time_phrase(time.replace(second=rng.randrange(60)), "medium")
    for unit in RELATIVE_UNITS:
        for number in range(1, 101):
            yield phrases.relative_phrase(number, unit)
            yield phrases.relative_phrase(-number, unit)
    for kind, share in _SHARES.items():
        for _ in range(round(num_phrases * share)):
            yield _DRAWS[kind](rng)
