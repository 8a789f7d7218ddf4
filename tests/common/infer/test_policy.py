"""A policy on small models: what it generates and scores, and how often it compiles."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
import pytest

from common.data.block_layout import lay_out
from common.errors import UserError
from common.infer.config import GREEDY, Beam, GenerationConfig, Limits, Method, Sample
from common.infer.generate import Request
from common.infer.policy import Policy
from common.infer.score import pair, score
from common.infer.texts import TextCodec, TextConventions, encode_prompt
from common.model import skeleton
from common.recipe import Execution
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.train.step import make_eval_step
from experiments.families import builder
from tests.common.infer.test_generate import LETTERS, MODEL, codec_of
from tests.helpers import F32, FAMILIES, MAX_POSITIONS, VOCAB, split

PROMPTS = ["abc", "", "hhhh", "d", "cafe" * 6]
LIMITS = {"max_new_tokens": 12, "rows": 4}


def letters(**change: Any) -> Policy:
    """Returns a policy of a toy model whose tokens are letters; it only generates."""
    parts: dict[str, Any] = {"config": None, "model": MODEL, "params": MODEL.params, "text": codec_of()}
    return Policy(mesh=make_mesh(MeshShape()), execution=Execution(), origin="toy", **parts | change)


def scorer(name: str, devices: int = 1) -> Policy:
    """Returns a policy of a small model of a family with random parameters; its texts are lists of ids."""
    model = skeleton(builder(FAMILIES[name], F32))
    conventions = TextConventions(alignment="start_token", start_id=3, eos_ids=(1,), bos_id=None)
    return Policy(
        config=FAMILIES[name],
        model=model,
        params=split(FAMILIES[name])[1],
        mesh=make_mesh(MeshShape(data=devices)),
        text=TextCodec(tokenizer=None, conventions=conventions),
        execution=F32,
        origin="random",
    )


@pytest.mark.parametrize(
    ("method", "samples"), [(GREEDY, 1), (Sample(temperature=1.3), 3), (Beam(size=3), 2)], ids=lambda x: str(x)[:6]
)
def test_texts_have_the_order_of_prompts_and_samples(method: Method, samples: int) -> None:
    """Each text is the one that its request alone has."""
    policy = letters()
    texts = policy.generate(PROMPTS, method, samples=samples, seed=5, **LIMITS)
    limits = Limits(max_new_tokens=12)
    how = GenerationConfig(method=method, limits=limits, samples=samples, seed=5, rows=4)
    expected = []
    for prompt in PROMPTS:
        for sample in range(how.decodings):
            request = Request(prompt=encode_prompt(prompt, codec_of()), sample=sample)
            [(_, completions)] = policy.complete([request], how)
            expected += [completion.text for completion in completions]
    assert texts == expected
    assert len(set(texts)) > len(PROMPTS) // 2


def test_stop_strings_and_the_shortest_text() -> None:
    policy = letters()
    [free] = policy.generate(["cafe"], min_new_tokens=8, **LIMITS)
    assert len(free.split()) >= 8
    assert policy.generate(["cafe"], min_new_tokens=8, stop=[free[4:7]], **LIMITS) == [free[: free.index(free[4:7])]]


def test_texts_that_a_beam_search_does_not_find_are_empty() -> None:
    """With one token that is no end token, there is one text of each length."""
    texts = letters().generate(["a"], Beam(size=30), samples=30, max_new_tokens=1)
    found = len(LETTERS)
    assert all(texts[1:found]) and texts[found:] == [""] * (30 - found)


def test_later_calls_compile_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """With other prompts of about the same number and length, another seed and another limit in the same bucket; and
    neither do calls with other parameters of the same model, such as those of a run with another seed."""

    def compiled() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
        caplog.clear()
        return found

    model, ids = dataclasses.replace(MODEL), scorer("gpt-rope")  # a copy, for which nothing is compiled yet
    policy, other = letters(model=model), letters(model=model, params={name: -x for name, x in MODEL.params.items()})
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for method in (GREEDY, Sample(temperature=1.2), Beam(size=2)):
            policy.generate(["abc", "d", "fff"], method, seed=1, **LIMITS)
            assert compiled()
        ids.score([([4, 5], [6]), ([7], [8, 9])], lengths=(8,))
        assert compiled()
        for method in (Beam(size=2), GREEDY, Sample(temperature=1.2)):
            policy.generate(["h", "bcde", "cafe", "aa"], method, seed=2, stop=["z"], rows=4, max_new_tokens=11)
            other.generate(["h", "bcde", "cafe", "aa"], method, seed=2, stop=["z"], rows=4, max_new_tokens=11)
        ids.score([([9, 9, 9], [10, 11, 12]), ([5], [6])], lengths=(8,))
        assert not compiled()


@pytest.mark.parametrize("name", ["gpt-rope", "t5like-bias"])
def test_scores_are_those_of_the_pairs(name: str) -> None:
    policy = scorer(name)
    pairs = [([5, 6, 7], [8, 9]), ([4], [10, 11, 12])]
    scores = policy.score(pairs, eos=True, lengths=(8,))
    ended = [pair([*inputs, 1], [*targets, 1], start_id=3) for inputs, targets in pairs]
    expected = score(policy.model, policy.params, policy.mesh, ended, execution=F32, rows=2, lengths=(8,))
    for one, other in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(one.log_probs_T, other.log_probs_T)
        assert one.nats_per_token == pytest.approx(-one.log_likelihood / one.tokens)
    assert [one.tokens for one in scores] == [3, 4]


def test_the_loss_is_that_of_the_training_step() -> None:
    policy, pairs = scorer("gpt-learned"), [([5, 6, 7], [8, 9]), ([4], [10, 11, 12]), ([], [])]
    encoded = [policy.encode_pair({"inputs": a, "targets": b}, eos=True, longest=8) for a, b in pairs]
    batch = lay_out([[p.example] for p in encoded], pad_id=0, starts=[[3]] * 3, input_length=8, target_length=8)
    with jax.set_mesh(policy.mesh):
        ce, weight = jax.jit(make_eval_step(policy.model, execution=F32))(policy.params, batch)
    assert weight == 3 + 4 + 1
    assert policy.loss(pairs, eos=True) == pytest.approx(float(ce / weight), rel=1e-5)
    assert policy.loss([]) == 0


def test_forms_of_what_is_scored() -> None:
    policy = scorer("gpt-learned", devices=2)
    records = [{"inputs": [5], "targets": [6, 7]}, {"context": [5], "continuation": [6, 7]}]
    [as_pair, as_inputs, as_context] = policy.score([([5], [6, 7]), *records], lengths=(8,))
    assert as_pair.log_likelihood == pytest.approx(as_inputs.log_likelihood, rel=1e-5)
    assert abs(as_context.log_likelihood - as_inputs.log_likelihood) > 1e-3


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ("text", {}, "pairs is one text: give a list"),
        ([([1], [2]), "text"], {}, r"pairs\[1\]: text is text, but the model has no tokenizer"),
        (
            [([1], [2], [3])],
            {},
            r"pairs\[0\]: it must be a text, a tuple \(inputs, targets\), or a dict with",
        ),
        ([["a", "b"]], {}, r"pairs\[0\]: it must be a text"),
        ([{"inputs": [1]}], {}, r"pairs\[0\]: it must be"),
        ([([1], [VOCAB])], {}, f"targets contains token {VOCAB}"),
        (
            [([1], [2] * 40)],
            {"lengths": (8,)},
            r"pairs\[0\]: it has 2 input and 40 target tokens; the longest",
        ),
        ([([1] * MAX_POSITIONS, [2])], {}, f"the model has {MAX_POSITIONS} positions"),
        ([([1], [2])], {"rows": 0}, "rows is 0: it must be 1 or more"),
    ],
)
def test_mistakes_in_scoring(pairs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scorer("gpt-learned").score(pairs, **options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("text", {}, "prompts is one text: give a list"),
        (["a"], {"samples": 2}, "greedy decoding generates one text"),
        (["a"], {"rows": 0}, "rows is 0"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_mistakes_in_generating(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        letters().generate(prompts, **options)


def test_a_model_without_a_tokenizer_says_so() -> None:
    policy = letters(text=dataclasses.replace(codec_of(), tokenizer=None))
    with pytest.raises(UserError, match="has no tokenizer"):
        policy.generate(["a"])
    with pytest.raises(UserError, match="has no tokenizer"):
        _ = policy.tokenizer
