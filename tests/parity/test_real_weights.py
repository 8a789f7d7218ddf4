"""Networks trained and published by others reproduce their published outputs."""

import dataclasses
import io
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from common.infer.config import GenerationConfig, Limits
from common.infer.generate import Completion, Generator, Request
from common.infer.texts import EncodedPrompt, TextCodec, TextConventions
from common.model import Skeleton, skeleton
from common.progress import ProgressBars
from common.recipe import Execution
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.trees import flatten
from experiments.families import ModelConfig, builder
from experiments.models.convert import convert
from experiments.models.finding import open_model
from tests.parity import copy_task
from tests.parity.shared_data import shared_file
from tests.parity.stories import BOS, StoriesTokenizer, write_hugging_face

F32 = Execution(dtype="float32", matmul_precision="highest")
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""
"""The text that llama2.c's own test expects from 200 greedy steps."""


def complete(
    model: Skeleton, params: Any, prompts: list[EncodedPrompt], codec: TextCodec, max_new_tokens: int
) -> list[Completion]:
    generator = Generator(model, params, make_mesh(MeshShape()), codec)
    how = GenerationConfig(limits=Limits(max_new_tokens=max_new_tokens), rows=len(prompts))
    found = dict(generator.complete([Request(prompt=prompt) for prompt in prompts], how))
    return [found[index][0] for index in range(len(prompts))]


def test_stories260k_tells_its_published_story(tmp_path):
    weights = shared_file("weights/stories260K/stories260K.bin")
    tokenizer: Any = StoriesTokenizer(shared_file("weights/stories260K/tok512.bin"))
    write_hugging_face(weights, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", ProgressBars(Console(file=io.StringIO())))
    loaded = open_model(str(tmp_path / "ours"), F32, make_mesh(MeshShape()))
    assert loaded.config.param_count() == 260_032
    conventions = loaded.text.conventions
    assert conventions.alignment == "native" and conventions.bos_id == BOS
    prompt = EncodedPrompt(inputs_I=np.array([], np.int32), start=BOS, before=(BOS,))
    text = dataclasses.replace(loaded.text, tokenizer=tokenizer)
    (story,) = complete(loaded.model, loaded.params, [prompt], text, 200)
    assert story.text == STORY


class Digits:
    """A tokenizer that only decodes."""

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def copying(kind: str, config: ModelConfig, params: Any, prompt: EncodedPrompt, max_new_tokens: int) -> Completion:
    model = skeleton(builder(config, F32))
    shapes = {leaf: value.shape for leaf, value in flatten(model.shapes, "/").items()}
    assert {leaf: value.shape for leaf, value in flatten(params, "/").items()} == shapes
    digits: Any = Digits()
    alignment: Literal["native", "start_token"] = "native" if kind == "gpt" else "start_token"
    conventions = TextConventions(alignment=alignment, start_id=0, eos_ids=(1,), bos_id=None)
    codec = TextCodec(tokenizer=digits, conventions=conventions)
    (found,) = complete(model, jax.tree.map(jnp.asarray, params), [prompt], codec, max_new_tokens)
    return found


def test_the_encoder_decoder_copies():
    source = [3, 7, 5, 3, 2, 4, 1, 8]
    config, params = copy_task.encoder_decoder(shared_file("weights/trax_copy/transformer_copy.npz"), len(source))
    prompt = EncodedPrompt(inputs_I=np.array(source, np.int32), start=0)
    found = copying("t5like", config, params, prompt, 12)
    assert found.tokens == (3, 7, 5, 3, 2, 4)
    assert found.finish == "eos"  # which is the 1 of [3 7 5 3 2 4 1]


def test_the_decoder_copies():
    config, params = copy_task.decoder_only(shared_file("weights/trax_copy/transformerlm_copy.npz"))
    # Shifted right by a 0. The network copies what follows the second 0.
    prompt = EncodedPrompt(inputs_I=np.array([0, 0, 3, 7, 5, 3, 2, 4], np.int32), start=0)
    assert copying("gpt", config, params, prompt, 6).tokens == (3, 7, 5, 3, 2, 4)
