"""Makes tokenizers of the `tokenizers` library encode the name of a special token as ordinary text.

The library's switch `encode_special_tokens` stops special tokens from being matched before a text is cut into pieces.
But a vocabulary may also have their names among its pieces, as T5's does, and then `</s>` in a text still becomes eos.
"""

import json
import secrets
from collections.abc import Collection
from typing import Any

import tokenizers

CONTEXTS = ("{}", "x{}x", " {} ")
"""Texts around a name, which may be cut differently at the start of a word and inside one."""


def plain_text_encoder(tokenizer: tokenizers.Tokenizer, reserved: Collection[int]) -> tokenizers.Tokenizer:
    """Returns a tokenizer with equal ids, except that names of `reserved` tokens in a text are spelled as text.

    Returns `tokenizer` itself, with `encode_special_tokens` set, if that is enough.
    """
    tokenizer.encode_special_tokens = True
    pieces, added = tokenizer.get_vocab(with_added_tokens=False), tokenizer.get_added_tokens_decoder()
    names = {name: token for token in sorted(reserved) if len(name := tokenizer.id_to_token(token) or "") > 1}
    if all(name not in pieces and added[token].special for name, token in names.items()):
        return tokenizer
    renamed = tokenizers.Tokenizer.from_str(json.dumps(_rename_tokens(json.loads(tokenizer.to_str()), names)))
    renamed.encode_special_tokens = True
    texts = [context.format(name) for name in names for context in CONTEXTS]
    before, after = (t.encode_batch_fast(texts, add_special_tokens=False) for t in (tokenizer, renamed))
    return tokenizer if [x.ids for x in before] == [x.ids for x in after] else renamed


def _rename_tokens(state: dict[str, Any], names: dict[str, int]) -> dict[str, Any]:
    """Returns a `tokenizer.json` in which the tokens `names` keep their ids, under new names that occur in no text."""
    nonce = secrets.token_hex(16)
    new = {name: f"\ufdd0{nonce} {token}" for name, token in names.items()}
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = {new.get(name, name): token for name, token in vocabulary.items()}
    else:
        vocabulary = [[new.get(piece, piece), score] for piece, score in vocabulary]
    changed = model | {"vocab": vocabulary}
    if model.get("unk_token") is not None:
        changed["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        changed["merges"] = [merge for merge in model["merges"] if not _involves(merge, new)]
    added = [token | {"content": new.get(token["content"], token["content"])} for token in state["added_tokens"]]
    return state | {"model": changed, "added_tokens": added, "post_processor": None}


def _involves(merge: str | list[str], names: Collection[str]) -> bool:
    """Returns whether a merge results in one of the names, or has one as a part."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return not {first, second, first + second}.isdisjoint(names)
