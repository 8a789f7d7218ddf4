"""Makes phrases of everyday locale data in two languages, from Unicode CLDR through babel.

Every phrase is one value (a date, an amount, a name) rendered in two locales. Values come from a hash of their kind and
index, so the phrases depend only on babel's data and this code, not on the clock, the hash seed, the machine's locale
or the version of Python. No network is needed.
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
"""Kind -> how many distinct sources to make; a kind may have fewer."""

WITHHELD_SHARE = 0.05
"""The share of names that occur only in the split of unseen names."""

DRAWS_PER_PHRASE = 4
"""A kind stops after this many draws for each wanted phrase, even if it has fewer distinct sources."""


class Phrase(NamedTuple):
    """One value in two languages; `names` are the names in it, as the source language writes them alone."""

    source: str
    target: str
    kind: str
    names: tuple[str, ...] = ()


def phrases(
    source: str, target: str, limit: int | None = None, tick: Callable[[], object] = lambda: None
) -> list[Phrase]:
    """Returns all phrases of a pair of babel locales, one per source text, in a fixed order.

    A source with two different translations is dropped, except that of two plain names the first table's is kept.

    Args:
      source, target: babel locale identifiers.
      limit: the most phrases of each kind (for tests); None: no limit.
      tick: progress callback, called once per drawn phrase.
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
    """Yields phrases until `wanted` distinct sources, including repeated sources on the way."""
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
    """Returns the names that only the split of unseen names may contain: `WITHHELD_SHARE` of each kind, by hash.

    Common names and all others are ranked separately, so that some unseen names occur in many phrases.
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
    """Returns a phrase for each name that both locales have, in an order that mixes the kinds of name."""
    found: dict[str, Phrase] = {}
    for table in _name_tables(pair):
        for source, target in table.values():
            found.setdefault(source, Phrase(source, target, "name", (source,)))
    return sorted(found.values(), key=lambda phrase: _rank(phrase.source))


def _phrases_wanted(kind: str, limit: int | None) -> int:
    """Returns the number of distinct sources to make of a kind."""
    return MIX[kind] if limit is None else min(limit, MIX[kind])


def _rank(text: str) -> bytes:
    """Returns a hash to sort by."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
