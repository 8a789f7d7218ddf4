"""Compares the pieces of two tokenizers, to decide whether they can share an embedding table."""

from common.data.tokenizers.tokenizer import Tokenizer


def piece(tokenizer: Tokenizer, token: int) -> str | None:
    """Returns the vocabulary's name of any id; None for an id that is unused or out of range."""
    return tokenizer.piece(token) if 0 <= token < tokenizer.vocab_size else None


def differing_ids(one: Tokenizer, other: Tokenizer) -> tuple[list[int], int]:
    """Returns (ids whose pieces differ, how many ids both tokenizers have).

    Tokenizers with equal hashes have equal pieces. Those with different hashes may too: the same model in another file
    format has another hash.
    """
    common = min(one.vocab_size, other.vocab_size)
    if one.content_hash == other.content_hash:
        return [], common
    return [token for token in range(common) if piece(one, token) != piece(other, token)], common
