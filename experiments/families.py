"""The one place that knows which module a config makes."""

import functools
from collections.abc import Callable

from flax import nnx

from common.model import Model
from common.recipe import Execution
from experiments.config import ModelConfig
from gpt.config import GptConfig
from gpt.model import Gpt
from t5like.config import T5LikeConfig
from t5like.model import T5Like


@functools.cache
def builder(config: ModelConfig, execution: Execution) -> Callable[[nnx.Rngs], Model]:
    """Returns a function that makes the model with its parameters; the same function for equal arguments."""
    match config:
        case T5LikeConfig():
            return lambda rngs: T5Like(config, execution, rngs=rngs)
        case GptConfig():
            return lambda rngs: Gpt(config, execution, rngs=rngs)
