"""Parsers of the corpora's formats: each turns the bytes of files into records.

A parser takes a split's files, unpacked and in order, and the names of the fields to make. It raises ValueError, with
the line, for anything that it cannot read; the caller adds the files' names.
"""

import re
from collections.abc import Sequence

from common.data.sources.records import Record, UnusableRecord, number_text
from common.json_text import parse_json

SPEECHES_PER_DOCUMENT = 100


def json_lines(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses one JSON object per line; `number_text` writes numbers and booleans.

    Skips a field that no record has; raises ValueError if only some records have it.

    >>> json_lines([b'{"q": "is it?", "a": true, "n": 3}'], ["q", "a"])
    [{'q': 'is it?', 'a': 'True'}]
    """
    found = []
    for number, line in _numbered_lines(files):
        try:
            record = parse_json(line, finite=False)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not a JSON object")
        found.append({field: _value_text(record[field], field, number) for field in fields if field in record})
    if any(record.keys() != found[0].keys() for record in found):
        raise ValueError(f"some records lack one of {', '.join(fields)}")
    return found


def columns(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses tab-separated cells, without quoting or header: one field for each column.

    >>> columns([b"jump\\tJUMP\\n"], ["inputs", "targets"])
    [{'inputs': 'jump', 'targets': 'JUMP'}]
    """
    found = []
    for number, line in _numbered_lines(files):
        cells = line.split("\t")
        if len(cells) != len(fields):
            raise ValueError(f"line {number} has {len(cells)} columns, not {len(fields)}")
        found.append(dict(zip(fields, cells, strict=True)))
    return found


def parallel(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses one file per field; line i of each file belongs to record i.

    >>> parallel([b"a dog\\na cat\\n", b"ein Hund\\neine Katze\\n"], ["en", "de"])[1]
    {'en': 'a cat', 'de': 'eine Katze'}
    """
    sides = [_lines(file) for file in files]
    if len({len(side) for side in sides}) != 1:
        raise ValueError(f"the files have {', '.join(str(len(side)) for side in sides)} lines, which must be equal")
    return [dict(zip(fields, cells, strict=True)) for cells in zip(*sides, strict=True)]


def commands(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses SCAN's lines.

    >>> commands([b"IN: jump twice OUT: I_JUMP I_JUMP\\n"], ["inputs", "targets"])
    [{'inputs': 'jump twice', 'targets': 'I_JUMP I_JUMP'}]
    """
    found = []
    for number, line in _numbered_lines(files):
        match = re.fullmatch(r"IN: (.+) OUT: (.+)", line)
        if not match:
            raise ValueError(f"line {number} is not 'IN: ... OUT: ...'")
        found.append(dict(zip(fields, match.groups(), strict=True)))
    return found


def questions(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses SQuAD's JSON: one record per question, with its first answer and its paragraph as `context`."""
    found = []
    for file in files:
        try:
            for article in parse_json(file)["data"]:
                for paragraph in article["paragraphs"]:
                    for asked in paragraph["qas"]:
                        record = {**asked, "context": paragraph["context"], "answer": asked["answers"][0]["text"]}
                        found.append({field: record[field] for field in fields})
        except (LookupError, TypeError) as error:
            raise ValueError(f"not laid out as SQuAD is ({error!r})") from error
    return found


def last_words(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses LAMBADA: the text, and the text divided at its last space into context and last word.

    >>> last_words([b'{"text": "He saw the ship"}'], ["text", "context", "last_word"])
    [{'text': 'He saw the ship', 'context': 'He saw the', 'last_word': 'ship'}]
    """
    texts = [record["text"] for record in json_lines(files, ["text"])]
    return [dict(zip(fields, (text, *text.rpartition(" ")[::2]), strict=True)) for text in texts]


def articles(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses WikiText: one document per article, cut before ` = Title = `; sections (` = = `) stay inside.

    A title has empty lines around it, unlike lines of formulas and legends that look like one. The documents end to end
    are the file, byte for byte, so a score per word or byte needs no correction.

    >>> text = b" \\n = Dog = \\n \\n A dog . \\n = 4 = \\n \\n = = Legs = = \\n \\n = Cat = \\n \\n A cat . \\n"
    >>> [record["text"].count("\\n") for record in articles([text], ["text"])]
    [7, 4]
    """
    (field,), pieces = fields, []
    for file in files:
        pieces += re.split(r"(?m)(?=^ ?\n = [^=\n][^\n]* = \n ?\n)", file.decode("utf-8"))
    return [{field: piece} for piece in pieces if piece]


def speeches(files: Sequence[bytes], fields: Sequence[str]) -> list[Record]:
    """Parses plays that are only speeches between empty lines, into documents of `SPEECHES_PER_DOCUMENT` speeches.

    The file marks neither plays nor scenes. One speech is too short for a language model to need context, and the whole
    file would be a single document; a hundred speeches are about as long as a scene. The documents end to end are the
    file.
    """
    (field,), pieces = fields, []
    for file in files:
        pieces += re.findall(r".+?(?:\n\n+|\Z)", file.decode("utf-8"), re.DOTALL)
    size = SPEECHES_PER_DOCUMENT
    return [{field: "".join(pieces[start : start + size])} for start in range(0, len(pieces), size)]


def _lines(file: bytes) -> list[str]:
    """Splits at newlines only; `splitlines` would also split at other characters, which texts contain."""
    return file.decode("utf-8").removesuffix("\n").split("\n") if file else []


def _numbered_lines(files: Sequence[bytes]) -> list[tuple[int, str]]:
    """Returns (line number, line) of all files; each file's lines count from 1."""
    return [numbered for file in files for numbered in enumerate(_lines(file), 1)]


def _value_text(value: object, field: str, number: int) -> str:
    """Returns a JSON value as text. Raises ValueError unless it is text or a finite number; `number` is its line."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        try:
            return number_text(value)
        except UnusableRecord as error:
            raise ValueError(f"line {number}: field {field!r}: {error}") from None
    raise ValueError(f"line {number}: field {field!r} must be text, not {type(value).__name__}")
