"""The model families: everything that a study, a command or the planner needs to know of one, in one list.

A third family is one more entry of `FAMILIES`, and one more member of `ModelConfig`. Importing this module imports no
JAX: networks and checkpoint formats are imported when they are needed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import gpt.config
import t5like.config
from experiments.models import weight_maps
from experiments.models.weight_maps import FamilyChange
from gpt.config import GptConfig
from t5like.config import T5LikeConfig

if TYPE_CHECKING:
    from flax import nnx

    from common.model import Model
    from common.recipe import Execution
    from common.weights.formats import Formats

ModelConfig = T5LikeConfig | GptConfig
"""The config of a model of any family. Config files name the family by its `kind`."""

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of layers, as the planner sees it."""

    layers: int
    slots: int
    """Slots of a row that pass through it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Generic[Config]):
    """What a model family provides."""

    kind: str
    """Its name in configs and on the command line, and the name of its package."""
    config: type[Config]
    sizes: Mapping[str, Config]
    """Published models by name."""
    sized: Callable[..., Config]
    """Makes a config from `width`, `layers`, `vocab_size` and, if they are not the usual ones, further sizes."""
    encodes_inputs: bool
    """Whether inputs are a sequence apart, read by an encoder; if not, inputs and targets are one sequence."""
    stacks: Callable[[Config, int, int], tuple[Stack, ...]]
    """(config, input slots, target slots of a row) -> its stacks, the encoder's first."""
    stacked: tuple[str, ...]
    """Top-level names of parameters with layers as their first axis."""
    load_network: Callable[[], Callable[..., "Model"]]
    """Imports the network's class, called as `network(config, execution, rngs=rngs)`."""
    load_formats: Callable[[], "Formats"]
    """Imports the checkpoint formats."""
    changes: Mapping[str, FamilyChange] = dataclasses.field(default_factory=dict)
    """How its models become models of another family, by that family's kind."""


def _t5like_network() -> Callable[..., "Model"]:
    from t5like.model import T5Like

    return T5Like


def _t5like_formats() -> "Formats":
    from t5like.convert.formats import FORMATS

    return FORMATS


def _gpt_network() -> Callable[..., "Model"]:
    from gpt.model import Gpt

    return Gpt


def _gpt_formats() -> "Formats":
    from gpt.convert.formats import FORMATS

    return FORMATS


T5LIKE = Family(
    kind="t5like",
    config=T5LikeConfig,
    sizes=t5like.config.SIZES,
    sized=t5like.config.sized,
    encodes_inputs=True,
    stacks=lambda config, inputs, targets: (
        Stack(layers=config.encoder_layers, slots=inputs),
        Stack(layers=config.decoder_layers, slots=targets),
    ),
    stacked=("encoder", "decoder"),
    load_network=_t5like_network,
    load_formats=_t5like_formats,
    changes={"gpt": weight_maps.TO_GPT},
)

GPT = Family(
    kind="gpt",
    config=GptConfig,
    sizes=gpt.config.SIZES,
    sized=gpt.config.sized,
    encodes_inputs=False,
    stacks=lambda config, inputs, targets: (Stack(layers=config.num_layers, slots=inputs + targets),),
    stacked=("layers",),
    load_network=_gpt_network,
    load_formats=_gpt_formats,
    changes={"t5like": weight_maps.TO_T5LIKE},
)

FAMILIES: tuple[Family[Any], ...] = (GPT, T5LIKE)


def family_of(config: ModelConfig) -> Family[Any]:
    """The family of a model.

    >>> family_of(GPT.sized(width=64, layers=2, vocab_size=128)).kind
    'gpt'
    """
    return next(family for family in FAMILIES if isinstance(config, family.config))


@functools.cache
def builder(config: ModelConfig, execution: "Execution") -> Callable[["nnx.Rngs"], "Model"]:
    """Returns a function that makes the model with its parameters; equal arguments give the same function."""
    network = family_of(config).load_network()
    return lambda rngs: network(config, execution, rngs=rngs)
