"""What all phrase makers use: the names of two locales (from Unicode CLDR through babel), and repeatable draws."""

import datetime
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from babel import Locale, numbers, units
from babel.core import get_global
from babel.languages import get_official_languages

Item = TypeVar("Item")

COMMON_TERRITORIES = tuple(
    (
        "AR AU BR CA CN DE FR GB ID IN IT JP KR MX RU SA TR US ZA "  # the G20's countries
        "AT BE BG CY CZ DK EE ES FI GR HR HU IE LT LU LV MT NL PL PT RO SE SI SK "  # and the rest of the EU
        "CH IS LI NO"  # and EFTA
    ).split()
)
"""Phrases of all kinds draw names from these territories, and from their official languages, scripts and currencies.
Any other name occurs once, as a phrase by itself."""

CURRENCY_DATE = datetime.date(2024, 1, 1)
"""The day for which currencies are current (babel's default is today)."""

FIRST_YEAR, YEARS = 1950, 100
"""One century, so that two-digit years are unambiguous."""

UNITS = (
    "length-millimeter length-centimeter length-meter length-kilometer length-inch length-foot length-yard length-mile "
    "mass-milligram mass-gram mass-kilogram mass-pound mass-ounce volume-milliliter volume-liter volume-cubic-meter "
    "volume-gallon area-square-meter area-square-kilometer area-hectare area-acre speed-kilometer-per-hour "
    "speed-mile-per-hour speed-meter-per-second temperature-celsius temperature-fahrenheit digital-byte "
    "digital-kilobyte digital-megabyte digital-gigabyte digital-terabyte duration-second duration-minute duration-hour "
    "duration-day duration-week duration-month duration-year power-watt power-kilowatt energy-kilowatt-hour "
    "energy-joule energy-kilocalorie electric-volt electric-ampere frequency-hertz frequency-megahertz pressure-bar "
    "pressure-hectopascal angle-degree"
).split()

PLURAL_PROBES = (1, 2, 5)
"""Numbers that show differences between plural forms."""

SPACES = str.maketrans(dict.fromkeys("\u00a0\u2007\u2009\u202f", " "))
"""Non-breaking, figure, thin and narrow spaces become ordinary ones."""


class Draw:
    """A sequence of pseudo-random draws from a hash of (kind, index), equal on every machine and Python version.

    The hash is one large number; each draw divides it by n, returns the remainder and keeps the quotient.

    >>> draw = Draw("date", 7)
    >>> 0 <= draw.below(10) < 10
    True
    >>> [Draw("date", i).pick("abc") for i in range(3)] == [Draw("date", i).pick("abc") for i in range(3)]
    True
    """

    def __init__(self, kind: str, index: int):
        self._state = int.from_bytes(hashlib.blake2b(f"{kind}/{index}".encode(), digest_size=48).digest(), "little")

    def below(self, n: int) -> int:
        """Returns an integer from 0 to n - 1."""
        self._state, value = divmod(self._state, n)
        return value

    def pick(self, items: Sequence[Item]) -> Item:
        """Returns one of `items`."""
        return items[self.below(len(items))]

    def number(self, digits: int) -> int:
        """Returns an integer below 10, 100, ... or 10**digits; each of these bounds is equally likely."""
        length = 1 + self.below(digits)
        return self.below(10**length)

    def moment(self) -> datetime.datetime:
        """Returns a date and time, to the second, in `YEARS` years from `FIRST_YEAR`."""
        start = datetime.datetime(FIRST_YEAR, 1, 1)
        days = (datetime.datetime(FIRST_YEAR + YEARS, 1, 1) - start).days
        return start + datetime.timedelta(days=self.below(days), seconds=self.below(86_400))


class LocalePair:
    """Two locales, and the names that both have for languages, territories, scripts and currencies."""

    def __init__(self, source: str, target: str):
        self.locales = self.source, self.target = Locale.parse(source), Locale.parse(target)
        self.languages = self._names("languages")
        self.territories = self._names("territories")
        self.scripts = self._names("scripts")
        self.currencies = self._names("currencies")

    def _names(self, field: str) -> dict[str, tuple[str, str]]:
        """Returns code -> (source name, target name), for the codes that both locales name."""
        source, target = getattr(self.source, field), getattr(self.target, field)
        return {
            code: (normalise_spaces(source[code]), normalise_spaces(target[code]))
            for code in sorted(source.keys() & target.keys())
        }

    def both(self, render: Callable[[Locale], str]) -> tuple[str, str]:
        """Returns what `render` writes in the source and in the target locale, with normalised spaces."""
        return normalise_spaces(render(self.source)), normalise_spaces(render(self.target))

    def common(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Returns names: field -> code -> (source, target).

        The fields are `COMMON_TERRITORIES` and their official languages, scripts and currencies.
        """
        languages = {code for t in COMMON_TERRITORIES for code in get_official_languages(t, de_facto=True)}
        likely = get_global("likely_subtags")
        scripts = {likely[code].split("_")[1] for code in languages if code in likely} | {"Hant"}
        currencies = {c for t in COMMON_TERRITORIES for c in numbers.get_territory_currencies(t, CURRENCY_DATE)}
        codes = {
            "territories": set(COMMON_TERRITORIES),
            "languages": languages,
            "scripts": scripts,
            "currencies": currencies,
        }
        return {
            field: {code: names for code, names in getattr(self, field).items() if code in codes[field]}
            for field in codes
        }

    def unit_names(self) -> dict[str, str]:
        """Returns the source locale's name of each unit, or the unit's identifier if it has none."""
        return {unit: normalise_spaces(units.get_unit_name(unit, "long", self.source) or unit) for unit in UNITS}


def normalise_spaces(text: str) -> str:
    """Returns `text` with every run of blanks, of any kind, as one ordinary space.

    >>> normalise_spaces("5\\u202f000\\xa0€")
    '5 000 €'
    """
    return " ".join(text.translate(SPACES).split())


def distinct_forms(forms: Iterable[Item], render: Callable[[Item, int], str]) -> list[Item]:
    """Returns the forms whose source texts differ from all earlier forms' texts, for the numbers in `PLURAL_PROBES`.

    English writes "5m" for metres and for minutes. Only the first is kept, since a source must have one target.
    """
    kept: list[Item] = []
    seen: set[str] = set()
    for form in forms:
        texts = {normalise_spaces(render(form, probe)) for probe in PLURAL_PROBES}
        if not texts & seen:
            kept.append(form)
        seen |= texts
    return kept
