"""The kinds of phrase: `MAKERS` has a function for each, which returns the kind's maker for a pair of locales.

A maker turns a `Draw` (a hash of kind and index) into one value rendered in both languages. What a maker draws, and in
which order, decides the data set: any change needs a new version in `cldr.py`.
"""

import datetime
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from babel import Locale, dates, lists, numbers, units

from common.data.built_in.cldr_pair import PLURAL_PROBES, UNITS, Draw, LocalePair, distinct_forms, normalise_spaces
from common.data.built_in.cldr_zones import common_zones

DATE_STYLES = ("full", "long", "medium", "short")
DATE_SKELETONS = ("yMMMEd", "MMMEd", "MMMMd", "yMMMM", "yQQQQ", "GyMMMd")
INTERVAL_SKELETONS = ("yMMMd", "yMMMEd", "yMd", "yMMMM", "MMMd")
TIME_INTERVAL_SKELETONS = ("Hm", "hm")
RELATIVE_DAYS = {
    "second": 1 / 86_400,
    "minute": 1 / 1_440,
    "hour": 1 / 24,
    "day": 1,
    "week": 7,
    "month": 30,
    "year": 365,
}
"""Days in each unit of relative times."""

Style = Any
"""A width or style; babel declares Literal types, which lists of styles lose."""

Translation = tuple[str, str, tuple[str, ...]]
"""(source text, target text, names in the source)."""
Maker = Callable[[Draw], Translation | None]
"""Returns a phrase of one kind, or None if this draw makes none."""


def _no_phrase(draw: Draw) -> None:
    """The maker for a kind that the locales have no data for."""


def _locales(pair: LocalePair) -> Maker:
    """Returns the maker of locale names: "Arabic (Devanagari)" / "Arabisch (Devanagari)"."""
    common = {field: list(table.values()) for field, table in pair.common().items()}
    if not (common["languages"] and common["scripts"] and common["territories"]):
        return _no_phrase

    def make(draw: Draw) -> Translation:
        names = [draw.pick(common["languages"])]
        form = draw.below(4)
        if form in (0, 1):
            names.append(draw.pick(common["scripts"]))
        if form != 0:
            names.append(draw.pick(common["territories"]))
        texts = [f"{name[side]} ({', '.join(n[side] for n in rest)})" for side in (0, 1) for name, *rest in [names]]
        return texts[0], texts[1], tuple(name[0] for name in names)

    return make


def _lists(pair: LocalePair) -> Maker:
    """Returns the maker of lists of names: "Norway, Bulgaria, or Greece" / "Norwegen, Bulgarien oder Griechenland"."""
    tables = [list(table.values()) for field, table in pair.common().items() if field != "scripts" and table]
    styles = _keys_in_both(("standard", "or"), pair, lambda locale: locale.list_patterns)
    if not (tables and styles):
        return _no_phrase

    def make(draw: Draw) -> Translation | None:
        table, style = draw.pick(tables), draw.pick(styles)
        names = list(dict.fromkeys(draw.pick(table) for _ in range(2 + draw.below(3))))
        if len(names) < 2:
            return None
        texts = [
            normalise_spaces(lists.format_list([name[side] for name in names], style, locale))
            for side, locale in enumerate(pair.locales)
        ]
        return texts[0], texts[1], tuple(name[0] for name in names)

    return make


def _dates(pair: LocalePair) -> Maker:
    """Returns the maker of dates: "March 1, 2048" / "1. März 2048"."""
    skeletons = _keys_in_both(DATE_SKELETONS, pair, lambda locale: locale.datetime_skeletons)

    def render(style: str, day: datetime.date, locale: Locale) -> str:
        if style in DATE_STYLES:
            return dates.format_date(day, style, locale)
        return dates.format_skeleton(style, day, fuzzy=False, locale=locale)

    styles = _by_month((*DATE_STYLES, *skeletons), lambda style, day: render(style, day, pair.source))

    def make(draw: Draw) -> Translation:
        day = draw.moment().date()
        style = draw.pick(styles[day.month])
        return (*pair.both(lambda locale: render(style, day, locale)), ())

    return make


def _by_month(styles: Iterable[str], render: Callable[[Style, datetime.date], str]) -> dict[int, list[str]]:
    """Returns, for each month, the styles whose texts differ: "May" is both a long and a short name."""

    def separate(month: int) -> list[str]:
        return distinct_forms(styles, lambda style, probe: render(style, datetime.date(2001, month, probe)))

    return {month: separate(month) for month in range(1, 13)}


def _times(pair: LocalePair) -> Maker:
    """Returns the maker of times: "2:33:48 PM Greenwich Mean Time" / "14:33:48 Mittlere Greenwich-Zeit"."""
    zones = common_zones(pair)

    def make(draw: Draw) -> Translation:
        style, zone, moment = draw.pick(("full", "full", "long", "medium", "short")), draw.pick(zones), draw.moment()
        if style == "full":
            return (*pair.both(lambda locale: dates.format_time(moment.replace(tzinfo=zone), style, zone, locale)), ())
        return (*pair.both(lambda locale: dates.format_time(moment.time(), style, locale=locale)), ())

    return make


def _datetimes(pair: LocalePair) -> Maker:
    """Returns the maker of dates with times: "Aug 27, 1956, 4:15:06 PM" / "27.08.1956, 16:15:06"."""

    def render(moment: datetime.datetime, date_style: str, time_style: str, locale: Locale) -> str:
        pattern = str(locale.datetime_formats[date_style]).replace("'", "")
        time = dates.format_time(moment.time(), time_style, locale=locale)
        return pattern.replace("{0}", time).replace("{1}", dates.format_date(moment.date(), date_style, locale))

    separate = _by_month(DATE_STYLES, lambda style, day: dates.format_date(day, style, pair.source))

    def make(draw: Draw) -> Translation:
        moment = draw.moment()
        styles = draw.pick(separate[moment.month]), draw.pick(("medium", "short"))
        return (*pair.both(lambda locale: render(moment, *styles, locale)), ())

    return make


def _ranges(pair: LocalePair) -> Maker:
    """Returns the maker of ranges of dates, times and numbers: "2,444.1 – 2,472.1" / "2.444,1 – 2.472,1"."""
    skeletons = _keys_in_both(INTERVAL_SKELETONS, pair, lambda locale: locale.interval_formats)
    time_skeletons = _keys_in_both(TIME_INTERVAL_SKELETONS, pair, lambda locale: locale.interval_formats)

    def between(low: str, high: str, locale: Locale) -> str:
        # babel has no pattern for number ranges; CLDR's general one for intervals is the nearest.
        return locale.interval_formats[None].replace("{0}", low).replace("{1}", high)

    def make(draw: Draw) -> Translation | None:
        form, start = draw.pick(("date", "date", "date", "time", "number")), draw.moment()
        if form == "date" and skeletons:
            end = (start + datetime.timedelta(days=1 + draw.number(4))).date()
            skeleton = draw.pick(skeletons)
            if "y" not in skeleton and end.year != start.year:
                return None
            return (*pair.both(lambda locale: dates.format_interval(start.date(), end, skeleton, locale=locale)), ())
        if form == "time" and time_skeletons:
            start = start.replace(second=0)
            end_time = start.replace(hour=draw.below(24), minute=draw.below(60))
            skeleton, (first, last) = draw.pick(time_skeletons), sorted((start.time(), end_time.time()))
            return (*pair.both(lambda locale: dates.format_interval(first, last, skeleton, locale=locale)), ())
        low = Decimal(draw.number(5)).scaleb(-draw.below(2))
        high = low + 1 + draw.number(4)

        def text(locale: Locale) -> str:
            low_text, high_text = (numbers.format_decimal(number, locale=locale) for number in (low, high))
            return between(low_text, high_text, locale)

        return (*pair.both(text), ())

    return make


def _relative(pair: LocalePair) -> Maker:
    """Returns the maker of relative times: "8 weeks ago" / "vor 8 Wochen"."""

    def render(form: tuple[Style, int, Style], count: int, locale: Locale) -> str:
        unit, sign, width = form
        days = datetime.timedelta(days=RELATIVE_DAYS[unit] * count * sign)
        # With an infinite threshold babel uses the finest allowed unit, which is the granularity.
        return dates.format_timedelta(days, unit, float("inf"), add_direction=True, format=width, locale=locale)

    def known(form: tuple[Style, int, Style]) -> bool:
        try:
            return all(render(form, 1, locale) for locale in pair.locales)
        except KeyError:  # babel lacks some widths of some languages
            return False

    forms = [(unit, sign, width) for width in ("long", "short", "narrow") for unit in RELATIVE_DAYS for sign in (1, -1)]
    forms = distinct_forms(filter(known, forms), lambda form, probe: render(form, probe, pair.source))
    if not forms:
        return _no_phrase
    names = pair.unit_names()

    def make(draw: Draw) -> Translation:
        form, count = draw.pick(forms), 1 + draw.number(4)
        return (*pair.both(lambda locale: render(form, count, locale)), (names[f"duration-{form[0]}"],))

    return make


def _units(pair: LocalePair) -> Maker:
    """Returns the maker of amounts with units: "637.3 kilograms" / "637,3 Kilogramm"."""

    def render(form: tuple[str, Style], count: int | Decimal, locale: Locale) -> str:
        return units.format_unit(count, form[0], form[1], locale=locale)

    def known(form: tuple[str, Style]) -> bool:
        # babel writes a unit's identifier if the locale has no name for it.
        return not any(form[0] in render(form, probe, locale) for locale in pair.locales for probe in PLURAL_PROBES)

    forms = [(unit, width) for width in ("long", "short") for unit in UNITS]
    forms = distinct_forms(filter(known, forms), lambda form, probe: render(form, probe, pair.source))
    if not forms:
        return _no_phrase
    names = pair.unit_names()

    def make(draw: Draw) -> Translation:
        form, count = draw.pick(forms), Decimal(draw.number(5)).scaleb(-draw.pick((0, 0, 1, 2)))
        return (*pair.both(lambda locale: render(form, count, locale)), (names[form[0]],))

    return make


def _currencies(pair: LocalePair) -> Maker:
    """Returns the maker of amounts of money: "DKK95.89" / "95,89 DKK"."""

    def render(form: tuple[str, Style], amount: int | Decimal, locale: Locale) -> str:
        return numbers.format_currency(amount, form[0], locale=locale, format_type=form[1])

    codes = pair.common()["currencies"]
    if not codes:
        return _no_phrase
    forms = distinct_forms(
        [(code, style) for style in ("standard", "name") for code in codes],
        lambda form, probe: render(form, probe, pair.source),
    )

    def make(draw: Draw) -> Translation:
        form, amount = draw.pick(forms), Decimal(draw.number(7)).scaleb(-2)
        if not numbers.get_currency_precision(form[0]):
            amount = amount.to_integral_value()
        names = (codes[form[0]][0],) if form[1] == "name" else ()
        return (*pair.both(lambda locale: render(form, amount, locale)), names)

    return make


def _compact(pair: LocalePair) -> Maker:
    """Returns the maker of large numbers in short form, some of them money: "HUF190M" / "190 Mio. HUF"."""
    styles = _keys_in_both(("short", "long"), pair, lambda locale: locale.compact_decimal_formats)
    codes = distinct_forms(
        pair.common()["currencies"] or ["USD"],
        lambda code, probe: numbers.format_currency(probe, code, locale=pair.source),
    )

    def make(draw: Draw) -> Translation:
        # At most four significant digits, so that the source shows all that the target does.
        number = Decimal(11 + draw.number(4)).scaleb(2 + draw.below(9))
        style = draw.pick(styles)
        code = draw.pick(codes) if draw.below(3) == 0 else None

        def text(locale: Locale) -> str:
            if code:
                return numbers.format_compact_currency(number, code, locale=locale, fraction_digits=3)
            return numbers.format_compact_decimal(number, format_type=style, locale=locale, fraction_digits=3)

        return (*pair.both(text), ())

    return make


def _numbers(pair: LocalePair) -> Maker:
    """Returns the maker of numbers, percentages and scientific notation: "219.43%" / "219,43 %"."""

    def make(draw: Draw) -> Translation:
        number = Decimal(draw.number(8)).scaleb(-draw.below(4)) * draw.pick((1, 1, 1, -1)) + 0  # never -0
        form = draw.pick(("decimal", "decimal", "percent", "scientific"))
        share = number.quantize(Decimal("0.1")) / 1000 + 0

        def text(locale: Locale) -> str:
            if form == "decimal":
                return numbers.format_decimal(number, locale=locale)
            if form == "percent":
                return numbers.format_percent(share, locale=locale, decimal_quantization=False)
            return numbers.format_scientific(number, locale=locale, decimal_quantization=False)

        return (*pair.both(text), ())

    return make


def _keys_in_both(keys: Iterable[str], pair: LocalePair, table: Callable[[Locale], Any]) -> list[Style]:
    """Returns the keys that both locales' tables have."""
    return [key for key in keys if all(key in table(locale) for locale in pair.locales)]


MAKERS: dict[str, Callable[[LocalePair], Maker]] = {
    "locale": _locales,
    "list": _lists,
    "date": _dates,
    "time": _times,
    "datetime": _datetimes,
    "range": _ranges,
    "relative": _relative,
    "unit": _units,
    "currency": _currencies,
    "compact": _compact,
    "number": _numbers,
}
