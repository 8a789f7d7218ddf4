"""The piece that each id of a tokenizer stands for, to decide whether two tokenizers can share tables."""

from common.data.tokenizers.tokenizer import Tokenizer


def piece(tokenizer: Tokenizer, token: int) -> str | None:
    """How its vocabulary names an id; None for one that stands for nothing."""
    return tokenizer.piece(token) if 0 <= token < tokenizer.vocab_size else None


def differing_ids(one: Tokenizer, other: Tokenizer) -> tuple[list[int], int]:
    """The ids, of those that both have, that do not stand for the same; and how many both have.

    Equal hashes need no look: the same model in another kind of file has another hash, but the same pieces.
    """
    common = min(one.vocab_size, other.vocab_size)
    if one.content_hash == other.content_hash:
        return [], common
    return [token for token in range(common) if piece(one, token) != piece(other, token)], common
