"""CLDR phrases: a value, and how each language writes it.

Only formats that can be read back are here: four-digit years, full month names, hours with their half of the day.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from engine.demo.corpus.cldr_vocabulary import RelativeUnit, locale_of, names

DateStyle = Literal["full", "long"]
TimeStyle = Literal["short", "medium"]
MoneyStyle = Literal["name", "standard"]
ListStyle = Literal["standard", "or"]
Render = Callable[[str], "str | None"]  # FLORES-200 tag -> raw phrase, None where the language has none


@dataclass(frozen=True, slots=True)
class Phrase:
    """One value in all languages. `value` decides the split: phrases of one kind and value stay together."""

    kind: str
    value: str
    render: Render


def date_phrase(day: datetime.date, style: str) -> Phrase:
    """style: full, long, or the skeletons yMMMM (month and year) and MMMMd (day and month)."""
    from babel.dates import format_date, format_skeleton

    def render(tag: str) -> str | None:
        locale = locale_of(tag)
        if style in ("full", "long"):
            return format_date(day, format=style, locale=locale)
        if style not in locale.datetime_skeletons:
            return None
        return format_skeleton(style, day, locale=locale, fuzzy=False)

    value = {"yMMMM": f"{day:%Y-%m}", "MMMMd": f"{day:%m-%d}"}.get(style, day.isoformat())
    return Phrase("cldr:date", value, render)


def time_phrase(time: datetime.time, style: TimeStyle) -> Phrase:
    """style: short (hours and minutes) or medium (with seconds)."""
    from babel.dates import format_time

    return Phrase("cldr:time", time.isoformat(), lambda tag: format_time(time, format=style, locale=locale_of(tag)))


def datetime_phrase(moment: datetime.datetime, style: DateStyle) -> Phrase:
    """A full or long date joined with a short time."""
    from babel.dates import format_date, format_time, get_datetime_format

    def render(tag: str) -> str:
        locale = locale_of(tag)
        pattern = str(get_datetime_format(style, locale=locale)).replace("'", "")
        date = format_date(moment.date(), format=style, locale=locale)
        return pattern.replace("{1}", date).replace("{0}", format_time(moment.time(), format="short", locale=locale))

    return Phrase("cldr:datetime", moment.isoformat(), render)


def number_phrase(number: Decimal) -> Phrase:
    """A number with the separators of the language."""
    from babel.numbers import format_decimal

    return Phrase("cldr:number", str(number), lambda tag: format_decimal(number, locale=locale_of(tag)))


def compact_phrase(number: Decimal) -> Phrase:
    """A large round number in words; the value must have at most two significant digits."""
    from babel.numbers import format_compact_decimal

    def render(tag: str) -> str | None:
        locale = locale_of(tag)
        # Chinese, Japanese and Korean have one form for both lengths, stored as the short one.
        style: Literal["long", "short"] = "long" if "long" in locale.compact_decimal_formats else "short"
        if style == "short" and tag not in ("jpn_Jpan", "zho_Hans", "kor_Hang"):
            return None
        return format_compact_decimal(number, format_type=style, locale=locale, fraction_digits=2)

    return Phrase("cldr:number", str(number), render)


def percent_phrase(share: Decimal) -> Phrase:
    """A share as per cent."""
    from babel.numbers import format_percent

    def render(tag: str) -> str:
        return format_percent(share, locale=locale_of(tag), decimal_quantization=False)

    return Phrase("cldr:percent", str(share), render)


def currency_phrase(amount: Decimal, currency: str, format_type: MoneyStyle) -> Phrase:
    """An amount of money; format_type: name or standard (with the symbol)."""
    from babel.numbers import format_currency

    def render(tag: str) -> str:
        return format_currency(amount, currency, locale=locale_of(tag), format_type=format_type)

    return Phrase("cldr:currency", str(amount), render)


def unit_phrase(number: Decimal, unit: str) -> Phrase:
    """A number with a unit of measure in words."""
    from babel.units import format_unit

    def render(tag: str) -> str | None:
        locale = locale_of(tag)
        text = format_unit(number, unit, length="long", locale=locale)
        # Where Chinese, Japanese and Korean have one form for all lengths, it is stored as the short one.
        if unit in text and tag in ("jpn_Jpan", "zho_Hans", "kor_Hang"):
            text = format_unit(number, unit, length="short", locale=locale)
        return None if unit in text else text

    return Phrase("cldr:unit", f"{number} {unit}", render)


def relative_phrase(number: int, unit: RelativeUnit) -> Phrase:
    """ "In 3 days" for positive numbers, "3 days ago" for negative ones."""
    from babel.dates import TIMEDELTA_UNITS, format_timedelta

    seconds = dict(TIMEDELTA_UNITS)[unit] * number

    def render(tag: str) -> str:
        return format_timedelta(
            seconds, granularity=unit, threshold=10**9, add_direction=True, locale=locale_of(tag)
        )  # fmt: skip

    return Phrase("cldr:relative", f"{number} {unit}", render)


def name_phrase(category: str, code: str) -> Phrase:
    """The name of a territory, language, script, currency, month or weekday."""
    return Phrase("cldr:name", f"{category} {code}", lambda tag: names(tag, category).get(code))


def list_phrase(parts: list[Phrase], style: ListStyle, kind: str = "cldr:list") -> Phrase:
    """Phrases joined as a list; style: standard ("and") or or."""
    from babel.lists import format_list

    def render(tag: str) -> str | None:
        texts = [part.render(tag) for part in parts]
        present = [text for text in texts if text is not None]
        return format_list(present, style=style, locale=locale_of(tag)) if len(present) == len(parts) else None

    return Phrase(kind, " + ".join(sorted(part.value for part in parts)), render)


def colon_phrase(head: Phrase, tail: Phrase) -> Phrase:
    """ "Head: tail" with the colon as the language writes it."""

    def render(tag: str) -> str | None:
        first, second = head.render(tag), tail.render(tag)
        if first is None or second is None:
            return None
        return first + {"fra_Latn": " : ", "zho_Hans": "：", "jpn_Jpan": "："}.get(tag, ": ") + second

    return Phrase("cldr:mixed", f"{head.value} + {tail.value}", render)


def bracket_phrase(head: Phrase, tail: Phrase) -> Phrase:
    """ "Head (tail)" with the brackets as the language writes them."""

    def render(tag: str) -> str | None:
        first, second = head.render(tag), tail.render(tag)
        if first is None or second is None:
            return None
        return f"{first}（{second}）" if tag == "zho_Hans" else f"{first} ({second})"

    return Phrase("cldr:mixed", f"{head.value} + {tail.value}", render)
