"""What a model family provides for each checkpoint format that its models can be read from or written to.

Formats are Hugging Face folders, one entry per `model_type`, and T5X checkpoints. The conversion itself is blind to
the family: it reads the config, matches the tensors to a `Table` and copies them (`common.weights.stream`).
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.recipe import Recipe, Widths
from common.weights.mapping import Table, TensorInfo
from common.weights.settings import Settings

HEAD = "lm_head.weight"
"""Hugging Face's name of an output projection that is not tied to the token table."""
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
"""Hugging Face's names of the tanh approximation of GELU, the only one that models here have."""

Described = tuple[dict[str, Any], list[str]]
"""Text conventions (see `common.weights.text`), and remarks for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceFormat:
    """A `model_type` of Hugging Face Transformers."""

    model_type: str
    embeddings: tuple[str, ...]
    """Names under which a checkpoint may store the token table, in order of preference."""
    wants_tied: Callable[[Settings], bool] | None = None
    """Whether config.json asks for a head tied to the token table; None: the tensors alone decide that."""
    read_config: Callable[[Settings, bool], tuple[Any, list[str]]]
    """(config.json, whether the head is tied) -> (model config, remarks); UserError names an unsupported field."""
    table: Callable[[Any, Iterable[str]], Table]
    """(model config, names in the checkpoint, or none) -> its tensors."""
    read_text: Callable[[Path, dict[str, Any]], Described]
    """(folder, config.json) -> text conventions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5XFormat:
    """A network of T5X. Its checkpoints hold neither config nor tokenizer."""

    fits: Callable[[Collection[str]], bool]
    """Whether a checkpoint with parameters of these names is one of this network."""
    read_config: Callable[[Mapping[str, TensorInfo], str], tuple[Any, list[str]]]
    """(parameters, what messages call the checkpoint) -> (model config, what was assumed)."""
    table: Callable[[Any], Table]
    text: Mapping[str, Any]
    """Text conventions, apart from the tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """The checkpoint formats of one family."""

    hugging_face: tuple[HuggingFaceFormat, ...]
    t5x: T5XFormat
    write_config: Callable[[Any, int | None], dict[str, Any]]
    """(model config, row length in training or None) -> config.json; UserError names a field without counterpart."""
    special_ids: Callable[[Any], dict[str, int | None]]
    """(text conventions) -> fields of config.json that name special ids, apart from the end token's."""


def axis_sizes(widths: Widths, vocab_size: int) -> dict[str, int]:
    """The size of each axis letter of a `Table`."""
    return {
        "V": vocab_size,
        "S": widths.max_positions or 0,
        "D": widths.d_model,
        "H": widths.num_heads,
        "G": widths.num_kv_heads,
        "C": widths.head_dim,
        "F": widths.d_ff,
        "R": widths.recipe.relative_buckets,
    }


_NOT_THE_NETWORK = (
    "init",
    "dropout",
    "z_loss",
    "norm_epsilon",
    "rope_theta",
    "relative_buckets",
    "relative_max_distance",
)
"""Recipe fields that concern training only, or that config.json states as a number."""


def require_recipe(recipe: Recipe, like: Recipe, name: str, free: Collection[str]) -> None:
    """Raises UserError for the first field in which `recipe` is another network than `like`, called `name`.

    Fields in `free` may differ, as may those that do not decide which network it is.
    """
    for field in dataclasses.fields(Recipe):
        value, theirs = getattr(recipe, field.name), getattr(like, field.name)
        if field.name not in (*_NOT_THE_NETWORK, *free) and value != theirs:
            value, theirs = (getattr(one, "kind", one) for one in (value, theirs))
            raise UserError(f"model.recipe.{field.name} is {value!r}: {name} has {theirs!r}")
