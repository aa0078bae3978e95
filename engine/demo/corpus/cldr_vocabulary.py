"""The closed sets that CLDR phrases are made of: currencies, units, years, and names by locale."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal

from engine.demo.corpus.languages import CLDR_LOCALES, LANGUAGES

RelativeUnit = Literal["second", "minute", "hour", "day", "week", "month", "year"]

CURRENCIES: Final = (
    "USD", "EUR", "GBP", "JPY", "CNY", "KRW", "INR", "CHF", "CAD", "AUD", "NZD", "SEK", "NOK", "DKK", "PLN", "CZK",
    "HUF", "RUB", "UAH", "TRY", "BRL", "MXN", "ARS", "CLP", "COP", "ZAR", "ILS", "THB", "VND", "IDR", "MYR", "PHP",
    "SGD", "HKD", "TWD", "EGP", "SAR", "AED", "RON", "BGN", "ISK", "KZT", "GEL", "NGN", "KES", "MAD", "PEN", "PKR",
)  # fmt: skip
UNITS: Final = (
    "length-kilometer", "length-meter", "length-centimeter", "length-millimeter", "length-mile", "length-foot",
    "length-inch", "length-yard", "mass-kilogram", "mass-gram", "mass-milligram", "mass-pound", "mass-ounce",
    "mass-tonne", "volume-liter", "volume-milliliter", "volume-cubic-meter", "volume-cup", "temperature-celsius",
    "temperature-fahrenheit", "temperature-kelvin", "duration-millisecond", "duration-second", "duration-minute",
    "duration-hour", "duration-day", "duration-week", "duration-month", "duration-year", "duration-decade",
    "speed-kilometer-per-hour", "speed-mile-per-hour", "speed-meter-per-second", "area-square-meter",
    "area-square-kilometer", "area-hectare", "area-acre", "energy-kilowatt-hour", "energy-joule", "energy-kilocalorie",
    "power-watt", "power-kilowatt", "power-megawatt", "power-horsepower", "frequency-hertz", "frequency-megahertz",
    "frequency-gigahertz", "digital-bit", "digital-byte", "digital-kilobyte", "digital-megabyte", "digital-gigabyte",
    "digital-terabyte", "electric-volt", "electric-ampere", "electric-ohm", "electric-milliampere",
    "pressure-hectopascal", "pressure-bar", "pressure-kilopascal", "angle-degree", "graphics-pixel",
    "graphics-megapixel", "light-lux", "consumption-liter-per-100-kilometer",
)  # fmt: skip
RELATIVE_UNITS: Final[tuple[RelativeUnit, ...]] = ("second", "minute", "hour", "day", "week", "month", "year")
FIRST_YEAR: Final = 1900
LAST_YEAR: Final = 2069


@cache
def locale_of(tag: str) -> Any:
    """The babel locale of a language."""
    try:
        from babel import Locale
    except ImportError as error:
        raise RuntimeError("babel writes the CLDR phrases: pip install 'babelephant[demo]'") from error
    return Locale.parse(CLDR_LOCALES[tag])


@cache
def names(tag: str, category: str) -> dict[str, str]:
    """Code -> name in a language; category: territory, language, script, currency, month, weekday."""
    locale = locale_of(tag)
    if category == "month":
        return {str(number): name for number, name in locale.months["stand-alone"]["wide"].items()}
    if category == "weekday":
        return {str(number): name for number, name in locale.days["stand-alone"]["wide"].items()}
    table = {
        "territory": locale.territories,
        "language": locale.languages,
        "script": locale.scripts,
        "currency": locale.currencies,
    }[category]
    return {code: name for code, name in table.items() if not name.startswith(code)}


CATEGORIES: Final = ("territory", "language", "currency", "month", "weekday", "script")


@cache
def shared_codes(category: str) -> tuple[str, ...]:
    """Codes that have a name in at least twelve of our languages, and no namesake of its category in any of them."""
    tables = [names(tag, category) for tag in LANGUAGES]
    codes = sorted({code for table in tables for code in table})
    if category == "territory":
        codes = [code for code in codes if code not in {"ZZ", "XA", "XB", "EZ", "UN"} and len(code) == 2]
    if category == "language":  # the two-letter codes are the better known languages
        codes = [code for code in codes if len(code) == 2]
    if category == "currency":
        codes = [code for code in codes if code in CURRENCIES]
    ambiguous: set[str] = set()
    for table in tables:
        owner: dict[str, str] = {}
        for code in codes:
            if (name := table.get(code)) is not None and owner.setdefault(name, code) != code:
                ambiguous.update((code, owner[name]))
    return tuple(
        code
        for code in codes
        if code in tables[0] and sum(code in table for table in tables) >= 12 and code not in ambiguous
    )
