"""What Hugging Face's GPT-2 and Llama share."""

from collections.abc import Iterable

from common.errors import UserError
from common.recipe import Recipe
from common.weights.formats import HEAD, axis_sizes, require_recipe
from common.weights.mapping import Extra, LoadRule, Table
from gpt.config import GptConfig


def make_table(
    config: GptConfig, rules: tuple[LoadRule, ...], extras: tuple[Extra, ...], prefix: str, names: Iterable[str]
) -> Table:
    """The table of a checkpoint with tensors of these names.

    All names but the head's start with `prefix`, except in checkpoints of headless models (GPT2Model, LlamaModel).
    """
    table = Table(
        rules=rules, sizes=axis_sizes(config, config.vocab_size), layers={"layers": config.num_layers}, extras=extras
    )
    names = list(names)
    headless = bool(names) and not any(name.startswith(prefix) for name in names)
    return table.without_prefix(prefix) if headless else table


def embedding_rules(config: GptConfig, embedding: str) -> tuple[LoadRule, ...]:
    """The token table, stored as `embedding`, and the head."""
    if config.recipe.tied_embeddings:
        return (LoadRule("embedding/table_VD", embedding, "V D", aliases=(HEAD,)),)
    return (LoadRule("embedding/table_VD", embedding, "V D"), LoadRule("output/weight_DV", HEAD, "V D"))


def require_network(config: GptConfig, *, like: Recipe, name: str, free: tuple[str, ...]) -> None:
    """Raises UserError for the first field in which the model differs from the network `name` with recipe `like`.

    The recipe's fields in `free` may differ.
    """
    if config.input_attention != "causal":
        raise UserError(f"model.input_attention is {config.input_attention!r}: {name} has 'causal'")
    # Only T5's biases, which neither GPT-2 nor Llama has, read `relative_sides`.
    require_recipe(config.recipe, like, name, (*free, "relative_sides"))
