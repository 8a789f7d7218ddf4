"""What tokenizers of every kind share: the table's width, valid text, and reading sentinels back."""

from collections.abc import Callable, Iterable, Sequence

from common.errors import UserError

TABLE_MULTIPLE = 128
"""Embedding tables are padded to a multiple of this, the width of a TPU register."""


def table_rows(vocab_size: int) -> int:
    """Rows of an embedding table.

    >>> table_rows(32100), table_rows(32128)
    (32128, 32128)
    """
    return -(-vocab_size // TABLE_MULTIPLE) * TABLE_MULTIPLE


def top_sentinel(k: int, sentinels: int, vocab_size: int) -> int:
    """The id of sentinel `k` where they are counted down from the highest id. Raises UserError beyond the last."""
    if not 0 <= k < sentinels:
        raise UserError(f"sentinel {k} does not exist: the tokenizer has {sentinels}")
    return vocab_size - 1 - k


def decode_around_sentinels(
    ids: Iterable[int], sentinel_numbers: dict[int, int], decode: Callable[[list[int]], str]
) -> str:
    """The text of `ids`: runs between sentinels by `decode`, sentinels as `<extra_id_K>` between spaces.

    >>> decode_around_sentinels([9, 1, 1, 8], {9: 0, 8: 1}, lambda run: "a" * len(run))
    '<extra_id_0> aa <extra_id_1>'
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
    return " ".join(part for part in parts if part)


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raises UserError naming the first text that is not valid Unicode."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"not valid Unicode (a lone surrogate): {text[:80]!r}") from None
