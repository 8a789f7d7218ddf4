"""The TFDS builder of the built-in data set `cldr_translate/SRC_DST`: everyday phrases in two languages.

The builder is an ordinary one that writes ArrayRecord files, so its data are read like those of any large TFDS corpus.
It needs no TensorFlow. This module imports tensorflow_datasets, which is slow: import it inside the function that uses
it.
"""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import babel
import tensorflow_datasets as tfds
from babel import localedata
from babel.core import get_cldr_version

from common.data.built_in.cldr_phrases import MIX, Phrase, phrases, withheld_names
from common.data.built_in.shares import SPLIT_PER_MILLE, split_by_hash
from common.data.built_in.tfds_builders import one_bar
from common.data.cache import build_once
from common.errors import UserError

UNSEEN_NAMES = "test_unseen_names"
"""The split of all phrases with a withheld name: one that occurs in no other split."""


@dataclasses.dataclass
class CldrConfig(tfds.core.BuilderConfig):
    """Names two babel locales, and the most phrases of each kind (`limit`, for tests; None: no limit)."""

    source: str = ""
    target: str = ""
    limit: int | None = None


class CldrTranslate(tfds.core.GeneratorBasedBuilder):
    """Makes the splits train, validation, test and test_unseen_names.

    A record has three texts, here of `cldr_translate/en_de`: {"en": "72 seconds", "de": "72 Sekunden", "kind": "unit"}.
    """

    VERSION = tfds.core.Version("1.0.0")

    tick: Callable[[], object] = staticmethod(lambda: None)
    """Progress callback, called once for each phrase that is drawn and once for each that is written."""

    def _info(self) -> tfds.core.DatasetInfo:
        config, text = self.builder_config, tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Dates, times, amounts, units and names in two languages, from Unicode CLDR through babel.",
            features=tfds.features.FeaturesDict({config.source: text(), config.target: text(), "kind": text()}),
            homepage="https://cldr.unicode.org",
            license="Unicode License v3",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict]]]:
        config = self.builder_config
        withheld = withheld_names(config.source, config.target)
        splits: dict[str, list[Phrase]] = {name: [] for name in (*SPLIT_PER_MILLE, UNSEEN_NAMES)}
        for phrase in phrases(config.source, config.target, config.limit, self.tick):
            splits[split_of(phrase, withheld)].append(phrase)
        return {name: self._generate_examples(members) for name, members in splits.items() if members}

    def _generate_examples(self, members: list[Phrase]) -> Iterator[tuple[str, dict]]:
        config = self.builder_config
        for phrase in members:
            self.tick()
            yield phrase.source, {config.source: phrase.source, config.target: phrase.target, "kind": phrase.kind}


def split_of(phrase: Phrase, withheld: frozenset[str]) -> str:
    """Returns the split of a phrase: `UNSEEN_NAMES` if a withheld name is in it, else one by the hash of its source."""
    if withheld.intersection(phrase.names):
        return UNSEEN_NAMES
    return split_by_hash(phrase.source)


def parse_pair(pair: str) -> tuple[str, str]:
    """Returns the two babel locales of `SRC_DST`.

    Raises UserError unless it names two different locales, spelled as babel spells them.

    >>> parse_pair("en_de")
    ('en', 'de')
    >>> parse_pair("pt_BR_zh_Hant")
    ('pt_BR', 'zh_Hant')
    >>> parse_pair("en_dee")
    Traceback (most recent call last):
    common.errors.UserError: cldr_translate/en_dee: babel knows no locale 'dee'; did you mean ee or de or kde?
    """
    where = f"cldr_translate/{pair}"
    # Territories and scripts begin with a capital letter, so "_" and a lower-case letter begin the second locale.
    locales = re.split(r"_(?=[a-z])", pair)
    if len(locales) != 2:
        raise UserError(f"{where}: name two locales as SRC_DST, for example cldr_translate/en_de")
    known = localedata.locale_identifiers()
    for locale in locales:
        if locale not in known:
            spelt = localedata.normalize_locale(locale)
            close = [spelt] if spelt else difflib.get_close_matches(locale, sorted(known), cutoff=0)
            raise UserError(f"{where}: babel knows no locale {locale!r}; did you mean {' or '.join(close)}?")
    if locales[0] == locales[1]:
        raise UserError(f"{where}: the two locales are the same; name another, for example cldr_translate/en_de")
    return locales[0], locales[1]


def maker_version(limit: int | None = None) -> str:
    """Returns, as one text, the versions of all that a pair's phrases depend on.

    These are the builder, babel, CLDR, and a hash of `limit` and the number of phrases of each kind:
    `1.0.0-babel-2.18.0-cldr-47-mix-bfabe703`.
    """
    mix = hashlib.blake2b(repr((sorted(MIX.items()), limit)).encode(), digest_size=4).hexdigest()
    return f"{CldrTranslate.VERSION}-babel-{babel.__version__}-cldr-{get_cldr_version()}-mix-{mix}"


def cldr_builder(pair: str, cache_dir: Path, limit: int | None = None) -> tfds.core.DatasetBuilder:
    """Returns a builder whose data are prepared, in the cache, in a folder for the pair and its `maker_version`.

    Args:
      pair: `SRC_DST`, two babel locales, for example "en_de".
      cache_dir: the folder for everything that can be rebuilt. If several processes ask for a pair, one prepares it and
        the others wait; what a killed process left is removed and made anew.
      limit: the most phrases of each kind (for tests); None: no limit.

    Raises UserError for a bad pair.
    """
    source, target = parse_pair(pair)
    config = CldrConfig(name=pair, source=source, target=target, limit=limit)

    def build(folder: Path) -> None:
        count = sum(MIX.values()) if limit is None else len(MIX) * limit
        with one_bar(f"making cldr_translate/{pair}", 2 * count) as tick:  # drawn and written: about two ticks a phrase
            builder = CldrTranslate(config=config, data_dir=folder, file_format="array_record")
            builder.tick = tick
            builder.download_and_prepare()

    folder = build_once(cache_dir / "tfds" / f"cldr_translate-{pair}-{maker_version(limit)}", build)
    return tfds.builder_from_directory(folder / CldrTranslate.name / pair / str(CldrTranslate.VERSION))
