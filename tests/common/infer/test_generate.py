"""Tests `Generator` from requests to texts, on a toy model whose tokens are letters."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.infer.config import GREEDY, Beam, GenerationConfig, Greedy, Limits, Method, Sample
from common.infer.generate import Completion, Generator, Request
from common.infer.texts import EncodedPrompt, TextCodec, TextConventions, decode_continuation, encode_prompt
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from tests.common.infer.toy import log_probs, toy

LETTERS = "~.abcdefgh"
"""Token 0 is the start token, 1 the end token; a text's first letter loses its space, as with SentencePiece."""
MODEL = toy(len(LETTERS), seed=19)


class Letters:
    """The part of a tokenizer that `Generator` uses; every token is a space and a letter."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([LETTERS.index(c) for c in text if c != " "], np.int32)

    encode_with_sentinels = encode

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f" {LETTERS[i]}" for i in ids)[1:]


TOKENIZER: Any = Letters()


def codec_of(tokenizer: Any = TOKENIZER, *, add_bos: bool = False, **change: Any) -> TextCodec:
    ids: dict[str, Any] = {"alignment": "start_token", "start_id": 0, "eos_ids": (1,), "bos_id": None}
    conventions = TextConventions(**ids | {"eos_after_inputs": False} | change)
    return TextCodec(tokenizer=tokenizer, conventions=conventions, add_bos=add_bos)


PROMPTS = ["abc", "", "hhhh", "d", "cafe" * 6]


def generator(codec: TextCodec | None = None, devices: int = 1) -> Generator:
    return Generator(MODEL, MODEL.params, make_mesh(MeshShape(data=devices)), codec or codec_of())


def config(method: Method = GREEDY, rows: int = 4, samples: int = 1, **limits: Any) -> GenerationConfig:
    limits = {"max_new_tokens": 12, **limits}
    return GenerationConfig(method=method, limits=Limits(**limits), rows=rows, samples=samples)


def requests(prompts: Sequence[str] = PROMPTS, codec: TextCodec | None = None) -> list[Request]:
    return [Request(prompt=encode_prompt(p, codec or codec_of())) for p in prompts]


def in_order(found: Iterable[tuple[int, list[Completion]]]) -> list[list[Completion]]:
    return [texts for _, texts in sorted(found, key=lambda pair: pair[0])]


def greedily(prompt: EncodedPrompt, most: int) -> list[int]:
    made: list[int] = []
    while len(made) < most and 1 not in made:
        made.append(int(log_probs(MODEL, prompt.inputs_I.tolist(), prompt.start, made)[-1].argmax()))
    return made


def test_each_request_gets_its_text() -> None:
    found = in_order(generator().complete(requests(), config()))
    for request, [one] in zip(requests(), found, strict=True):
        made = greedily(request.prompt, 12)
        assert list(one.tokens) == [t for t in made if t != 1]
        assert one.text == Letters().decode(one.tokens)
        assert one.finish == ("eos" if made[-1] == 1 else "length")
        rows = log_probs(MODEL, request.prompt.inputs_I.tolist(), request.prompt.start, made[:-1])
        assert one.log_probability == pytest.approx(rows[np.arange(len(made)), made].sum(), abs=1e-4)
    assert {one.finish for [one] in found} == {"eos", "length"}


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_batches_of_any_size(rows: int) -> None:
    method = Sample(temperature=1.4)
    expected = in_order(generator().complete(requests(), config(method)))
    found = in_order(generator().complete(requests(), config(method, rows=rows)))
    assert [[c.tokens for c in texts] for texts in found] == [[c.tokens for c in texts] for texts in expected]


def test_stop_strings() -> None:
    """The string spans tokens: the text is cut before it, the tokens extend to its end."""
    free = in_order(generator().complete(requests(), config()))
    long = max(range(len(PROMPTS)), key=lambda i: len(free[i][0].tokens))
    text = free[long][0].text
    stop = text[4:7]  # two tokens' letters and what is between
    for method in (Greedy(), Beam(size=1, length_penalty=0.0)):
        [one] = in_order(generator().complete(requests(), config(method, stop=(stop, "#"))))[long]
        assert one.finish == "stop"
        assert one.text == text[: text.index(stop)]
        assert one.tokens == free[long][0].tokens[: len(one.tokens)]
        assert stop in Letters().decode(one.tokens)
        assert stop not in Letters().decode(one.tokens[:-1])
        assert one.log_probability > free[long][0].log_probability


def test_streamed_pieces_join_to_the_text() -> None:
    for stop in ((), ("a b",), ("h",)):
        streamed = [""] * len(PROMPTS)

        def on_text(index: int, piece: str, streamed: list[str] = streamed) -> None:
            streamed[index] += piece

        method = Sample(temperature=1.2)
        found = in_order(generator().complete(requests(), config(method, stop=stop, max_new_tokens=11), on_text))
        assert streamed == [one.text for [one] in found]


def test_native_alignment_continues_the_text() -> None:
    codec = codec_of(alignment="native")
    prompt = encode_prompt("abc", codec)
    assert (prompt.inputs_I.tolist(), prompt.start) == ([2, 3], 4)
    [[one]] = in_order(generator(codec).complete(requests(["abc"], codec), config()))
    assert list(one.tokens) == [t for t in greedily(prompt, 12) if t != 1]
    assert one.text == Letters().decode([2, 3, 4, *one.tokens])[len("a b c") :]
    assert one.text.startswith(" ")


@pytest.mark.parametrize(
    ("codec", "text", "expected"),
    [
        (codec_of(), "ab", ([2, 3], 0)),
        (codec_of(eos_after_inputs=True), "ab", ([2, 3, 1], 0)),
        (codec_of(eos_after_inputs=True), "", ([1], 0)),
        (codec_of(eos_after_inputs=True, bos_id=9, add_bos=True), "ab", ([9, 2, 3, 1], 0)),
        (codec_of(bos_id=9), "ab", ([2, 3], 0)),
        (codec_of(alignment="native"), "", ([], 1)),
        (codec_of(alignment="native", bos_id=9), "", ([], 9)),
        (codec_of(alignment="native", bos_id=9), "ab", ([2], 3)),
        (codec_of(alignment="native", bos_id=9, add_bos=True), "ab", ([9, 2], 3)),
        (codec_of(alignment="native", eos_ids=()), "", ([], 0)),
    ],
)
def test_encoded_prompts(codec: TextCodec, text: str, expected: tuple[list[int], int]) -> None:
    prompt = encode_prompt(text, codec)
    assert (prompt.inputs_I.tolist(), prompt.start, prompt.written) == (*expected, ())


@pytest.mark.parametrize(("text", "written", "start"), [("", (), 0), ("a", (0,), 2), ("abc", (0, 2, 3), 4)])
def test_a_language_models_prompt_follows_the_start_token(text: str, written: tuple[int, ...], start: int) -> None:
    codec = codec_of(prompts="targets", eos_after_inputs=True)
    prompt = encode_prompt(text, codec)
    assert (prompt.inputs_I.tolist(), prompt.written, prompt.start) == ([], written, start)
    assert decode_continuation(prompt, [5, 6], codec) == (" d e" if text else "d e"), "the text is continued"


def test_too_many_positions_raise() -> None:
    """Raises before generating; a prompt in the targets takes as many positions as one in the inputs."""
    model, mesh = toy(len(LETTERS)), make_mesh(MeshShape())
    model = dataclasses.replace(model, max_positions=15)
    for codec in (codec_of(), codec_of(prompts="targets")):
        made = Generator(model, model.params, mesh, codec)
        with pytest.raises(UserError, match=r"longest prompt has 4 .* has 15 positions; nearest: max_new_tokens=11"):
            made.complete(requests(["a", "hhhh"], codec), config())
        assert len(made.complete(requests(["a", "hhh"], codec_of()), config()).__next__()) == 2


def test_hashes_distinguish_prompts() -> None:
    hashes = {encode_prompt(p, codec_of()).hash() for p in ["", "a", "b", "aa", "ab", "ba", "~", "a~", "~a"]}
    hashes |= {encode_prompt("ab", codec_of(alignment="native")).hash()}
    hashes |= {encode_prompt(p, codec_of(prompts="targets")).hash() for p in ("ab", "abc")}
    assert len(hashes) == 12


def test_tokens_are_decoded_alone_if_the_whole_text_changes_the_prompt() -> None:
    class Unstable(Letters):
        def decode(self, ids: Iterable[int]) -> str:
            return str(len(list(ids)))

    codec = codec_of(alignment="native", tokenizer=Unstable())
    assert decode_continuation(encode_prompt("abc", codec), [5, 6], codec) == "2"


def test_beams_give_several_texts() -> None:
    found = in_order(generator().complete(requests(), config(Beam(size=3), samples=3)))
    for texts in found:
        assert len(texts) == 3
        assert len({(one.tokens, one.finish) for one in texts}) == 3
        ended = [one.score for one in texts if one.finish == "eos"]
        assert ended == sorted(ended, reverse=True)


def test_prompts_need_a_tokenizer() -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        encode_prompt("abc", codec_of(tokenizer=None))


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_are_sharded_over_the_mesh(rows: int) -> None:
    """A batch has a multiple of eight rows, more than there are requests."""
    expected = in_order(generator().complete(requests(), config()))
    sharded = in_order(generator(devices=8).complete(requests(), config(rows=rows)))
    assert [t[0].tokens for t in sharded] == [t[0].tokens for t in expected]
    assert jax.device_count() == 8
