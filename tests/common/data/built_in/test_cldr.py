"""The built-in data set of phrases: its phrases and splits, concurrent builds, and builds that are killed."""

import collections
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from common.data.built_in import cldr, cldr_phrases
from common.data.built_in.cldr_pair import COMMON_TERRITORIES, LocalePair
from common.data.built_in.cldr_phrases import MIX, Phrase, phrases, withheld_names
from common.errors import UserError

SMALL = 60


@pytest.fixture(scope="module")
def en_de() -> list[Phrase]:
    return phrases("en", "de", 1_500)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return cldr.cldr_builder("en_de", tmp_path_factory.mktemp("cache"), SMALL)


def records(builder) -> dict[str, list[dict]]:
    sources = {name: builder.as_data_source(split=name) for name in builder.info.splits}
    return {name: source.__getitems__(list(range(len(source)))) for name, source in sources.items()}


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        ("name", "Germany", "Deutschland"),
        ("name", "Swiss Franc", "Schweizer Franken"),
        ("locale", r"German \(\w+\)", r"Deutsch \([\w ]+\)"),
        ("list", r"\w+, \w+, and \w+", r"[^,]+, [^,]+ und [^,]+"),
        ("date", r"\w+day, May \d+, \d{4}", r"\w+, \d+\. Mai \d{4}"),
        ("time", r"\d+:\d\d:\d\d PM Central European Standard Time", r"\d\d:\d\d:\d\d Mitteleuropäische Normalzeit"),
        ("datetime", r"\d+/\d+/\d\d, \d+:\d\d PM", r"\d\d\.\d\d\.\d\d, \d\d:\d\d"),
        ("range", r"[\d,]+ – [\d,]+", r"[\d.]+ – [\d.]+"),
        ("relative", r"in \d+ days", r"in \d+ Tagen"),
        ("unit", r"[\d,.]+ kilometers per hour", r"[\d,.]+ Kilometer pro Stunde"),
        ("currency", r"€[\d,]+\.\d\d", r"[\d.]+,\d\d €"),
        ("compact", r"[\d.]+ million", r"[\d,]+ Million(en)?"),
        ("number", r"[\d,.]+%", r"[\d.,]+ %"),
    ],
)
def test_every_kind_reads_as_expected(en_de, kind, source, target):
    matching = [phrase for phrase in en_de if phrase.kind == kind and re.fullmatch(source, phrase.source)]
    assert matching
    assert all(re.fullmatch(target, phrase.target) for phrase in matching), matching[:5]


def test_sources_are_distinct_tidy_and_of_every_kind(en_de):
    assert len({phrase.source for phrase in en_de}) == len(en_de)
    assert {phrase.kind for phrase in en_de} == set(MIX)
    for phrase in en_de:
        for text in phrase.source, phrase.target:
            assert text and text == " ".join(text.split()), repr(text)


def test_the_mix_is_large_and_even():
    asked = sum(MIX.values())
    assert asked >= 210_000
    assert max(MIX.values()) < 0.15 * asked
    assert MIX["name"] < 0.01 * asked


@pytest.mark.parametrize(("kind", "render"), [("range", "1 – 2"), ("number", "7")])
def test_a_source_with_two_targets_is_dropped(monkeypatch, kind, render):
    def torn(pair):
        return lambda draw: (render, f"{draw.below(2)}", ())

    assert any(phrase.kind == kind for phrase in phrases("en", "de", 20))
    monkeypatch.setitem(cldr_phrases.MAKERS, kind, torn)
    assert not any(phrase.kind == kind for phrase in phrases("en", "de", 20))


@pytest.mark.parametrize("pair", [("en", "de"), ("fr", "ja"), ("de", "fa")])
def test_a_name_of_two_things_has_one_target(pair):
    names = cldr_phrases._plain_names(LocalePair(*pair))
    assert len({phrase.source for phrase in names}) == len(names) > 1_000


def test_months_whose_abbreviation_is_the_name_have_one_target(en_de):
    """English writes "May 5, 2001" for the long and for the medium style; German does not."""
    may = [phrase.target for phrase in en_de if re.fullmatch(r"May \d+, \d{4}", phrase.source)]
    assert may and all(re.fullmatch(r"\d+\. Mai \d{4}", target) for target in may)


def test_phrases_do_not_depend_on_the_machine():
    code = """
import hashlib
from common.data.built_in.cldr_phrases import phrases, withheld_names
print(hashlib.blake2b(repr((phrases("en", "de", 200), sorted(withheld_names("en", "de")))).encode()).hexdigest())
"""
    places = [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "LANG": "C", "TZ": "UTC"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8", "TZ": "Asia/Tokyo"},
    ]
    digests = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **place}, capture_output=True, check=True
        ).stdout
        for place in places
    ]
    here = repr((phrases("en", "de", 200), sorted(withheld_names("en", "de")))).encode()
    assert [digest.decode().strip() for digest in digests] == [hashlib.blake2b(here).hexdigest()] * 2


@pytest.mark.parametrize("pair", ["fr_ja", "en_pt_BR", "zh_Hant_ar", "sr_Latn_he", "guz_en", "de_aa", "en_en_GB"])
def test_any_two_locales_work(pair):
    """Locales with little data (Gusii, Afar) give fewer kinds, not an error."""
    made = phrases(*cldr.parse_pair(pair), 20)
    assert len({phrase.kind for phrase in made}) >= 8
    assert len({phrase.source for phrase in made}) == len(made)
    assert not any("duration-" in text or "length-" in text for p in made for text in (p.source, p.target))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("en_dee", ("'dee'", " de ")),
        ("ne_Dev_de", ("'ne_Dev'", "ne")),
        ("EN_de", ("'EN'", "did you mean en?")),
        ("pt_br_de", ("SRC_DST",)),
        ("en", ("SRC_DST",)),
        ("", ("SRC_DST",)),
        ("en_en", ("same",)),
        ("en_de_fr", ("SRC_DST",)),
        ("en_qqqqqqq", ("'qqqqqqq'",)),
    ],
)
def test_a_bad_pair_is_a_clear_error(tmp_path, pair, words):
    with pytest.raises(UserError) as error:
        cldr.cldr_builder(pair, tmp_path)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_splits_contain_every_phrase_once(small):
    made = {phrase.source: phrase for phrase in phrases("en", "de", SMALL)}
    found = [record for members in records(small).values() for record in members]
    assert len(found) == len(made)
    assert {(r["en"].decode(), r["de"].decode(), r["kind"].decode()) for r in found} == {
        (phrase.source, phrase.target, phrase.kind) for phrase in made.values()
    }


def test_split_shares_and_that_the_split_depends_only_on_the_source(en_de):
    withheld = withheld_names("en", "de")
    seen = [phrase for phrase in en_de if not withheld & set(phrase.names)]
    counts = collections.Counter(cldr.split_of(phrase, withheld) for phrase in seen)
    assert counts["train"] / len(seen) == pytest.approx(0.95, abs=0.01)
    assert counts["validation"] / len(seen) == pytest.approx(0.025, abs=0.006)
    assert counts["test"] / len(seen) == pytest.approx(0.025, abs=0.006)
    for phrase in seen[:200]:
        assert cldr.split_of(phrase._replace(target="", kind=""), withheld) == cldr.split_of(phrase, withheld)


def test_withheld_names_occur_nowhere_else(small):
    """Checked by text: every phrase of names in that split contains a withheld name, and no other phrase does."""
    withheld = withheld_names("en", "de")
    pieces = re.compile(r",? and |,? or |, | \(|\)")
    for split, members in records(small).items():
        for record in members:
            if record["kind"] in (b"name", b"list", b"locale"):
                text = record["en"].decode()
                named = {text, *pieces.split(text)} & withheld
                assert bool(named) == (split == cldr.UNSEEN_NAMES), (split, text)


def test_withheld_currencies_and_units_are_unseen_in_amounts_too(en_de):
    withheld = withheld_names("en", "de")
    rupees = [phrase for phrase in en_de if phrase.kind == "currency" and "Indian rupee" in phrase.source]
    ounces = [phrase for phrase in en_de if phrase.kind == "unit" and re.search(r" (oz|ounces?)$", phrase.source)]
    assert "Indian Rupee" in withheld and "ounces" in withheld and rupees and ounces
    assert {cldr.split_of(phrase, withheld) for phrase in rupees + ounces} == {cldr.UNSEEN_NAMES}


@pytest.mark.parametrize("pair", [("en", "de"), ("fr", "ja"), ("de", "en")])
def test_some_common_names_of_each_field_are_withheld(pair):
    withheld = withheld_names(*pair)
    for field, table in LocalePair(*pair).common().items():
        names = {source for source, _ in table.values()}
        if field != "scripts":
            assert 0 < len(names & withheld) <= 0.1 * len(names)


def test_common_names_occur_often_and_others_only_alone(en_de):
    uses = collections.Counter(name for phrase in en_de if phrase.kind == "list" for name in phrase.names)
    territories = [
        source for code, (source, _) in LocalePair("en", "de").territories.items() if code in COMMON_TERRITORIES
    ]
    # These 1,500 lists represent the 5,600 in a sample of 60,000 phrases.
    assert min(uses[name] for name in territories) >= 10


def test_the_maker_version_names_everything_that_the_phrases_depend_on(monkeypatch, tmp_path):
    version = cldr.maker_version()
    assert cldr.babel.__version__ in version and f"cldr-{cldr.get_cldr_version()}" in version
    assert cldr.maker_version(5) != version
    monkeypatch.setitem(cldr.MIX, "date", 5)
    assert cldr.maker_version() != version
    folders = set()
    for babel_version in ("2.18.0", "9.9.9"):
        monkeypatch.setattr(cldr.babel, "__version__", babel_version)
        folders.add(cldr.cldr_builder("en_de", tmp_path, 2).data_path)
    assert len(folders) == 2


BUILD = """
import json, sys, pathlib
from common.data.built_in import cldr
builder = cldr.cldr_builder("en_de", pathlib.Path(sys.argv[1]), int(sys.argv[2]))
print(json.dumps({name: split.num_examples for name, split in builder.info.splits.items()}))
print(any(name.split(".")[0] == "tensorflow" for name in sys.modules), file=sys.stderr)
"""


def start(cache, limit=SMALL):
    command = [sys.executable, "-c", BUILD, str(cache), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_concurrent_processes_build_once_without_tensorflow(small, tmp_path):
    running = [start(tmp_path) for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in running]
    expected = {name: split.num_examples for name, split in small.info.splits.items()}
    for process, (out, err) in zip(running, ends, strict=True):
        assert process.returncode == 0, err
        assert json.loads(out) == expected  # and nothing else was printed
        assert err.strip().endswith("False")
    assert len([path for path in (tmp_path / "tfds").iterdir() if not path.name.startswith(".")]) == 1
    assert not list((tmp_path / "tfds").glob(".*.part"))


def test_a_killed_build_leaves_nothing_that_is_read_as_data(tmp_path):
    victim = start(tmp_path, 2_000)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("tfds/.*.part/**/*incomplete*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert list(tmp_path.glob("tfds/.*.part")), "killed too early or too late"
    assert not [path for path in (tmp_path / "tfds").iterdir() if not path.name.startswith(".")]
    out, err = start(tmp_path, 2_000).communicate(timeout=60)
    assert sum(json.loads(out).values()) == len(phrases("en", "de", 2_000)), err
    assert not list((tmp_path / "tfds").glob(".*.part"))


def test_a_second_opening_builds_nothing(small, tmp_path, monkeypatch):
    cldr.cldr_builder("en_de", tmp_path, 3)
    monkeypatch.setattr(cldr, "phrases", lambda *_: pytest.fail("built again"))
    assert cldr.cldr_builder("en_de", tmp_path, 3).info.splits["train"].num_examples > 0
