"""Phrases of everyday locale data in two languages, from Unicode CLDR through babel.

Every phrase is one value (a date, an amount, a name) rendered in two locales. Values come from a hash of their kind and
number, so that the phrases depend on babel's data and on this code alone, not on the clock, the hash seed, the
machine's locale or the version of Python. Reading babel takes no network.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from common.data.built_in.cldr_kinds import MAKERS, Maker
from common.data.built_in.cldr_pair import Draw, LocalePair

MIX: dict[str, int] = {
    "name": 2_000,
    "locale": 6_000,
    "list": 10_000,
    "date": 24_000,
    "time": 22_000,
    "datetime": 24_000,
    "range": 18_000,
    "relative": 22_000,
    "unit": 24_000,
    "currency": 24_000,
    "compact": 24_000,
    "number": 16_000,
}
"""Distinct sources asked for, by kind; a kind whose material runs out gives fewer."""

WITHHELD_SHARE = 0.05

DRAWS_PER_PHRASE = 4
"""Distinct sources are given up after so many draws for each of them."""


class Phrase(NamedTuple):
    """One value in two languages; `names` are the names in it, as the source language calls them on their own."""

    source: str
    target: str
    kind: str
    names: tuple[str, ...] = ()


def phrases(
    source: str, target: str, limit: int | None = None, tick: Callable[[], object] = lambda: None
) -> list[Phrase]:
    """All phrases of a pair of babel locales, one per source text, in a fixed order.

    Args:
      source, target: babel locale identifiers.
      limit: at most so many phrases of each kind (for tests).
      tick: called once per phrase, for a progress bar.

    A source that two values translate differently is dropped, except that among plain names the first table wins.
    """
    pair = LocalePair(source, target)
    found = {phrase.source: phrase for phrase in _plain_names(pair)[: _phrases_wanted("name", limit)]}
    ambiguous = set()
    for kind, make in MAKERS.items():
        for phrase in _draw_phrases(kind, make(pair), _phrases_wanted(kind, limit)):
            tick()
            known = found.setdefault(phrase.source, phrase)
            if known.target != phrase.target:
                ambiguous.add(phrase.source)
    return [phrase for text, phrase in found.items() if text not in ambiguous]


def _draw_phrases(kind: str, make: Maker, wanted: int) -> Iterator[Phrase]:
    """`wanted` phrases of distinct sources, and whatever else was said of the same sources on the way."""
    seen: set[str] = set()
    for index in range(DRAWS_PER_PHRASE * wanted):
        made = make(Draw(kind, index))
        if made is None or not (made[0] and made[1]):
            continue
        source, target, names = made
        seen.add(source)
        yield Phrase(source, target, kind, names)
        if len(seen) == wanted:
            return


def withheld_names(source: str, target: str) -> frozenset[str]:
    """Names that only the split of unseen names may hold: the share of each kind of name with the smallest hashes.

    Common names and the long tail are judged apart, so that the unseen names include some that occur in many phrases.
    """
    pair = LocalePair(source, target)
    groups = [[names[0] for names in table.values()] for field, table in pair.common().items() if field != "scripts"]
    rest = {names[0] for table in _name_tables(pair) for names in table.values()}
    groups.append(sorted(rest.difference(*groups)))
    groups.append(list(pair.unit_names().values()))
    withheld = set()
    for group in groups:
        ranked = sorted(set(group), key=_rank)
        withheld.update(ranked[: round(len(ranked) * WITHHELD_SHARE)])
    return frozenset(withheld)


def _name_tables(pair: LocalePair) -> tuple[dict[str, tuple[str, str]], ...]:
    return pair.territories, pair.languages, pair.scripts, pair.currencies


def _plain_names(pair: LocalePair) -> list[Phrase]:
    """Every name that both locales have, in an order that mixes the kinds of name."""
    found: dict[str, Phrase] = {}
    for table in _name_tables(pair):
        for source, target in table.values():
            found.setdefault(source, Phrase(source, target, "name", (source,)))
    return sorted(found.values(), key=lambda phrase: _rank(phrase.source))


def _phrases_wanted(kind: str, limit: int | None) -> int:
    return MIX[kind] if limit is None else min(limit, MIX[kind])


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
