"""Functions for all kinds of tokenizers: the table's rows, checks of text, and sentinels and modes in texts."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from common.errors import UserError

TABLE_MULTIPLE = 128
"""Embedding tables are padded to a multiple of this, the width of a TPU register."""


SPACE_MARK = "\u2581"
"""How SentencePiece writes a space; a text that contains this character needs care to be decoded unchanged."""
SENTINEL = re.compile(r"<extra_id_(0|[1-9]\d{0,4})>")
"""A sentinel's name in a text."""
MODE = re.compile(r"\[[A-Z][A-Z0-9]*\]")
"""The name of a mode token, for example UL2's "[S2S]": it precedes the inputs and names the example's objective."""


def table_rows(vocab_size: int) -> int:
    """Returns the rows of an embedding table: `vocab_size`, padded up to a multiple of `TABLE_MULTIPLE`.

    >>> table_rows(32100), table_rows(32128)
    (32128, 32128)
    """
    return -(-vocab_size // TABLE_MULTIPLE) * TABLE_MULTIPLE


def own_sentinels(vocabulary: Mapping[str, int], wanted: int) -> list[int]:
    """Returns the ids of the sentinels that a vocabulary already has, in order; mT5's begin with SentencePiece's mark.

    Raises UserError if it has any and `wanted` is another number, except 0.

    >>> own_sentinels({"</s>": 0, "\u2581<extra_id_1>": 7, "<extra_id_0>": 8, "<extra_id_3>": 9}, 0)
    [8, 7]
    """
    ids: list[int] = []
    while here := [name for mark in ("", SPACE_MARK) if (name := f"{mark}<extra_id_{len(ids)}>") in vocabulary]:
        ids.append(vocabulary[here[0]])
    if ids and wanted not in (0, len(ids)):
        raise UserError(f"tokenizer.sentinels is {wanted}, but the tokenizer already has {len(ids)}; nearest: 0")
    return ids


def sentinels_on_top(pieces: int, sentinels: int) -> list[int]:
    """Returns the ids of sentinels above a tokenizer's pieces, from sentinel 0, which has the highest id, down."""
    return [*range(pieces + sentinels - 1, pieces - 1, -1)]


def sentinel_at(sentinel_ids: Sequence[int], k: int) -> int:
    """Returns the id of sentinel `k`. Raises UserError if there is none."""
    if not 0 <= k < len(sentinel_ids):
        raise UserError(f"sentinel {k} does not exist: the tokenizer has {len(sentinel_ids)}")
    return sentinel_ids[k]


def decode_around_sentinels(
    ids: Iterable[int], sentinel_numbers: dict[int, int], decode: Callable[[list[int]], str]
) -> str:
    """Returns the text of `ids`: `decode` decodes the runs between sentinels; a sentinel is `<extra_id_K>` with spaces.

    Args:
      ids: any ids.
      sentinel_numbers: id of a sentinel -> its number K.
      decode: decodes ids without sentinels.

    >>> decode_around_sentinels([9, 1, 1, 8], {9: 0, 8: 1}, lambda run: "a" * len(run))
    '<extra_id_0> aa <extra_id_1>'
    >>> decode_around_sentinels([9, 1, 8], {9: 0, 8: 1}, lambda run: " a" * len(run))
    '<extra_id_0> a <extra_id_1>'
    """
    runs: list[list[int]] = [[]]
    marks: list[str] = []
    for token in map(int, ids):
        if token in sentinel_numbers:
            marks.append(f"<extra_id_{sentinel_numbers[token]}>")
            runs.append([])
        else:
            runs[-1].append(token)
    texts = [decode(run) for run in runs]
    parts = [texts[0], *(part for pair in zip(marks, texts[1:], strict=True) for part in pair)]
    text = ""
    for part in parts:
        apart = not text or not part or text[-1].isspace() or part[0].isspace()
        text += part if apart else f" {part}"
    return text


def encode_around_sentinels(
    text: str, sentinel_ids: Sequence[int], encode: Callable[[str], Iterable[int]], *, adds_space: bool
) -> list[int]:
    """Returns the ids of `text`, in which names of sentinels become their ids and `encode` encodes the rest.

    The inverse of `decode_around_sentinels`: a space before a sentinel is dropped. One after it belongs to the next
    word, unless `encode` puts a space before every text (`adds_space`), in which case it is dropped too.

    >>> letters = lambda run: [ord(c) for c in run]
    >>> encode_around_sentinels("a <extra_id_1> b<extra_id_2>", [8, 9], letters, adds_space=True)[:3]
    [97, 9, 98]
    >>> encode_around_sentinels("a <extra_id_1> b", [8, 9], letters, adds_space=False)
    [97, 9, 32, 98]
    """
    marks = [mark for mark in SENTINEL.finditer(text) if int(mark[1]) < len(sentinel_ids)]
    begins, ends = [0, *(mark.end() for mark in marks)], [*(mark.start() for mark in marks), len(text)]
    ids: list[int] = []
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        run = text[begin:end]
        if number < len(marks):
            run = run.removesuffix(" ")
        if number and adds_space:
            run = run.removeprefix(" ")
        ids += [int(token) for token in encode(run)] if run else []
        ids += [sentinel_ids[int(mark[1])] for mark in marks[number : number + 1]]
    return ids


def encode_after_mode(text: str, modes: Mapping[str, int], encode: Callable[[str], Iterable[int]]) -> list[int]:
    """Returns the ids of `text`: a leading mode's name becomes its id, without the next space; `encode` does the rest.

    >>> encode_after_mode("[S2S] a", {"[S2S]": 3}, lambda run: [ord(c) for c in run])
    [3, 97]
    """
    found = MODE.match(text)
    if found is None or found[0] not in modes:
        return list(encode(text))
    return [modes[found[0]], *encode(text[found.end() :].removeprefix(" "))]


def check_unicode(texts: Sequence[str]) -> None:
    """Raises UserError for the first text that is not valid Unicode."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"not valid Unicode (a lone surrogate): {text[:80]!r}") from None
