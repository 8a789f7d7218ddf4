"""The checkpoint formats of decoder-only models: Hugging Face's GPT-2 and Llama, T5X's decoder_only."""

from typing import Any

from common.infer.texts import TextConventions
from common.weights.formats import Formats
from gpt.config import GptConfig
from gpt.convert import gpt2, llama, t5x


def write_config(config: GptConfig, row_length: int | None = None) -> dict[str, Any]:
    """A config.json from which Hugging Face Transformers builds the same network: a GPT-2 or a Llama.

    `row_length`: the length of the texts that it was trained on, used if it has no table of positions; None: not known.

    Raises:
        UserError: naming a field that no such network has.
    """
    if config.recipe.positions == "learned":
        return gpt2.write_config(config)
    return llama.write_config(config, row_length)


def _special_ids(text: TextConventions) -> dict[str, int | None]:
    # A language model trained here begins every text with its start token, which then is what others call bos.
    begins_with_start = text.alignment == "start_token" and text.prompts == "targets"
    return {"bos_token_id": text.start_id if begins_with_start else text.bos_id}


FORMATS = Formats(
    hugging_face=(gpt2.FORMAT, llama.FORMAT),
    t5x=t5x.FORMAT,
    write_config=write_config,
    special_ids=_special_ids,
)
