"""Text conventions of a foreign folder: tokenizer files, special ids, and how targets follow inputs.

The result is the section `text` of model.json (see `common.weights.folder`). `alignment` is "start_token" if the first
decoder input is `start_id`, "native" if it is the last token of the preceding text.
"""

import dataclasses
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
"""Files of a foreign folder that a model folder keeps unchanged."""
TOKENIZER = "tokenizer.json"
MOST_SENTINELS = 2**16


def start_token_text(folder: Path, config: dict[str, Any], *, sentinels: int) -> tuple[dict[str, Any], list[str]]:
    """The text conventions of an encoder-decoder, and remarks for the user.

    `sentinels` is the number of extra ids on top of the SentencePiece model, if the folder does not specify it.
    """
    ids = config | _json(folder / "generation_config.json")
    starts = [*token_ids(ids.get("decoder_start_token_id"), "decoder_start_token_id")]
    starts += token_ids(ids.get("pad_token_id"), "pad_token_id")
    text: dict[str, Any] = {
        "tokenizer": _sentence_piece(folder, "spiece.model", _sentinels(folder, sentinels)) or _byte_pair(folder),
        "alignment": "start_token",
        "start_id": [*starts, 0][0],
        "eos_ids": token_ids(ids.get("eos_token_id", 1), "eos_token_id"),
        "bos_id": None,
    }
    frame = read_frame(folder)
    if frame is None or text["tokenizer"] is None:
        return text, []
    remarks = []
    if frame.bos_id is not None:
        text["bos_id"], text["tokenizer"]["add_bos"] = frame.bos_id, True
        remarks.append(f"inputs begin with {frame.before[0]} (id {frame.bos_id}), as {TOKENIZER} says")
    elif frame.before:
        remarks.append(frame.ignored("before", frame.before))
    if not frame.after:
        text["eos_after_inputs"] = False
        remarks.append(f"inputs end without an end token, as {TOKENIZER} says")
    elif [frame.ids.get(name) for name in frame.after] != text["eos_ids"][:1]:
        remarks.append(frame.ignored("after", frame.after))
    return text, remarks


def native_text(
    folder: Path, config: dict[str, Any], *, bos: int, eos: int, adds_bos: bool
) -> tuple[dict[str, Any], list[str]]:
    """The text conventions of a decoder-only model, and remarks for the user.

    `bos`, `eos` and `adds_bos` are defaults of the architecture, used if the folder does not specify them.
    """
    ids = config | _json(folder / "generation_config.json")
    bos_ids = token_ids(ids.get("bos_token_id", bos), "bos_token_id")
    eos_ids = token_ids(ids.get("eos_token_id", eos), "eos_token_id")
    tokenizer = _byte_pair(folder) or _sentence_piece(folder, "tokenizer.model", 0)
    remarks = []
    if tokenizer is not None:
        frame = read_frame(folder) or Frame([], [], {})
        stated = _json(folder / "tokenizer_config.json").get("add_bos_token")
        from_template = not isinstance(stated, bool) and (folder / TOKENIZER).is_file()
        tokenizer["add_bos"] = bool(frame.before) if from_template else stated if isinstance(stated, bool) else adds_bos
        if from_template and frame.bos_id is not None and bos_ids[:1] != [frame.bos_id]:
            bos_ids = [frame.bos_id]
            remarks.append(f"texts begin with {frame.before[0]} (id {frame.bos_id}), as {TOKENIZER} says")
        if from_template and len(frame.before) > 1:
            remarks.append(frame.ignored("before", frame.before))
        if frame.after:
            remarks.append(f"{frame.ignored('after', frame.after)}, since a completion continues its prompt")
    text = {
        "tokenizer": tokenizer,
        "alignment": "native",
        "start_id": [*bos_ids, *eos_ids, 0][0],
        "eos_ids": eos_ids,
        "bos_id": bos_ids[0] if bos_ids else None,
    }
    return text, remarks


@dataclasses.dataclass(frozen=True)
class Frame:
    """The special tokens that tokenizer.json adds around every text, by name."""

    before: list[str]
    after: list[str]
    ids: dict[str, int]
    """Ids of the special tokens, if tokenizer.json states them."""

    @property
    def bos_id(self) -> int | None:
        """The id of the token before a text; None unless there is exactly one."""
        return self.ids.get(self.before[0]) if len(self.before) == 1 else None

    def ignored(self, side: str, names: list[str]) -> str:
        """The remark that the tokens `names`, before or after every text, are ignored."""
        return f"{TOKENIZER} puts {' '.join(names)} {side} every text, which is ignored"


def read_frame(folder: Path) -> Frame | None:
    """The special tokens that the post-processor of a folder's tokenizer.json adds; None if it has none."""
    post = _json(folder / TOKENIZER).get("post_processor")
    steps = post.get("processors", [post]) if isinstance(post, dict) else []
    for step in steps if isinstance(steps, list) else []:
        match step:
            case {"type": "TemplateProcessing", "single": [*parts]}:
                return _read_template(parts, step.get("special_tokens"))
            case {
                "type": "RobertaProcessing" | "BertProcessing",
                "cls": [str(first), int(first_id)],
                "sep": [str(last), int(last_id)],
            }:
                return Frame([first], [last], {first: first_id, last: last_id})
    return None


def _read_template(parts: list[Any], special_tokens: Any) -> Frame:
    """The frame of a TemplateProcessing step: the special tokens before and after its first `Sequence`."""
    names: list[str | None] = []  # None stands for the text
    for part in parts:
        match part:
            case {"SpecialToken": {"id": str(name)}}:
                names.append(name)
            case {"Sequence": _}:
                names.append(None)
    place = names.index(None) if None in names else len(names)
    ids = {}
    for name, token in special_tokens.items() if isinstance(special_tokens, dict) else ():
        match token:
            case {"ids": [int(only)]} if only >= 0:
                ids[name] = only
    return Frame([name for name in names[:place] if name], [name for name in names[place:] if name], ids)


def _json(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty if there is no such file. Raises UserError if it is not an object."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _sentence_piece(folder: Path, name: str, sentinels: int) -> dict[str, Any] | None:
    if not (folder / name).is_file():
        return None
    return sentence_piece(name, sentinels)


def sentence_piece(name: str, sentinels: int) -> dict[str, Any]:
    """The `tokenizer` entry of model.json for a SentencePiece model kept as `name`."""
    return {"kind": "sentencepiece", "file": f"{SOURCE}/{name}", "sentinels": sentinels}


def byte_pair(sentinels: int) -> dict[str, Any]:
    """The `tokenizer` entry of model.json for a tokenizer.json, with `sentinels` extra ids on top of its tokens."""
    return {"kind": "byte_pair", "file": f"{SOURCE}/tokenizer.json", "sentinels": sentinels}


def _byte_pair(folder: Path) -> dict[str, Any] | None:
    if (folder / "tokenizer.json").is_file():
        return byte_pair(0)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return {"kind": "byte_pair", "vocab": f"{SOURCE}/vocab.json", "merges": f"{SOURCE}/merges.txt"}
    return None


def _sentinels(folder: Path, default: int) -> int:
    """The number of extra ids on top of the SentencePiece model's own pieces."""
    path = folder / "tokenizer_config.json"
    described = _json(path)
    if (stated := described.get("extra_ids")) is not None:
        if type(stated) is not int or not 0 <= stated <= MOST_SENTINELS:
            raise UserError(f"{path}: extra_ids is {shown(stated)}: it must be a number from 0 to {MOST_SENTINELS}")
        return stated
    named = described.get("additional_special_tokens") or described.get("extra_special_tokens")
    if not isinstance(named, list):
        return default
    texts = (str(one.get("content", "") if isinstance(one, dict) else one) for one in named)
    return sum(bool(re.fullmatch(r"<extra_id_\d+>", text)) for text in texts)
