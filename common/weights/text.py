"""What a foreign folder says of its text: tokenizer files, special ids, and how targets follow inputs.

The result is the section `text` of model.json (see `common.weights.folder`). `alignment` is "start_token" where a
decoder's first input is `start_id`, "native" where it is the last token of the text before.
"""

import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json
from common.weights.folder import SOURCE
from common.weights.settings import shown, token_ids

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a foreign folder that are kept unchanged."""
MOST_SENTINELS = 2**16


def start_token_text(folder: Path, config: dict[str, Any], *, sentinels: int) -> dict[str, Any]:
    """Of an encoder-decoder; `sentinels` is how many extra ids its tokenizer has where the folder does not say."""
    ids = config | _json(folder / "generation_config.json")
    starts = [*token_ids(ids.get("decoder_start_token_id"), "decoder_start_token_id")]
    starts += token_ids(ids.get("pad_token_id"), "pad_token_id")
    return {
        "tokenizer": _sentence_piece(folder, "spiece.model", _sentinels(folder, sentinels)) or _byte_pair(folder),
        "alignment": "start_token",
        "start_id": [*starts, 0][0],
        "eos_ids": token_ids(ids.get("eos_token_id", 1), "eos_token_id"),
        "bos_id": None,
    }


def native_text(folder: Path, config: dict[str, Any], *, bos: int, eos: int, adds_bos: bool) -> dict[str, Any]:
    """Of a decoder-only model; ids and `adds_bos` are its architecture's, for where the folder does not say."""
    ids = config | _json(folder / "generation_config.json")
    bos_ids = token_ids(ids.get("bos_token_id", bos), "bos_token_id")
    eos_ids = token_ids(ids.get("eos_token_id", eos), "eos_token_id")
    tokenizer = _byte_pair(folder) or _sentence_piece(folder, "tokenizer.model", 0)
    if tokenizer is not None:
        tokenizer["add_bos"] = _adds_bos(folder, adds_bos)
    return {
        "tokenizer": tokenizer,
        "alignment": "native",
        "start_id": [*bos_ids, *eos_ids, 0][0],
        "eos_ids": eos_ids,
        "bos_id": bos_ids[0] if bos_ids else None,
    }


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises UserError for one that is no JSON object."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object")
    return value


def _sentence_piece(folder: Path, name: str, sentinels: int) -> dict[str, Any] | None:
    if not (folder / name).is_file():
        return None
    return sentence_piece(name, sentinels)


def sentence_piece(name: str, sentinels: int) -> dict[str, Any]:
    """The entry of a SentencePiece model that is carried along as `name`."""
    return {"kind": "sentencepiece", "file": f"{SOURCE}/{name}", "sentinels": sentinels}


def byte_pair(sentinels: int) -> dict[str, Any]:
    """The entry of a `tokenizer.json` that is carried along; `sentinels` are those that lie on top of its tokens."""
    return {"kind": "byte_pair", "file": f"{SOURCE}/tokenizer.json", "sentinels": sentinels}


def _byte_pair(folder: Path) -> dict[str, Any] | None:
    if (folder / "tokenizer.json").is_file():
        return byte_pair(0)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return {"kind": "byte_pair", "vocab": f"{SOURCE}/vocab.json", "merges": f"{SOURCE}/merges.txt"}
    return None


def _sentinels(folder: Path, default: int) -> int:
    """Extra ids that lie on top of the SentencePiece model's own pieces."""
    path = folder / "tokenizer_config.json"
    described = _json(path)
    if (stated := described.get("extra_ids")) is not None:
        if type(stated) is not int or not 0 <= stated <= MOST_SENTINELS:
            raise UserError(f"{path}: extra_ids is {shown(stated)}: it is a number from 0 to {MOST_SENTINELS}")
        return stated
    named = described.get("additional_special_tokens") or described.get("extra_special_tokens")
    if not isinstance(named, list):
        return default
    texts = (str(one.get("content", "") if isinstance(one, dict) else one) for one in named)
    return sum(bool(re.fullmatch(r"<extra_id_\d+>", text)) for text in texts)


def _adds_bos(folder: Path, default: bool) -> bool:
    """Whether the tokenizer puts bos before a text."""
    stated = _json(folder / "tokenizer_config.json").get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    if not (folder / "tokenizer.json").is_file():
        return default
    post = _json(folder / "tokenizer.json").get("post_processor")
    steps = post.get("processors", [post]) if isinstance(post, dict) else []
    return any(_begins_with_special(step) for step in steps) if isinstance(steps, list) else False


def _begins_with_special(step: Any) -> bool:
    """Whether a step of a post-processor is a template with a special token in front."""
    match step:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": _}, *_]}:
            return True
    return False
