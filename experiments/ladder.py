"""The ladder: an encoder-decoder turned into a decoder-only model, one structural assumption at a time.

Source    Hyung Won Chung's part of Stanford CS25 V4 (2024-04-11): the talk gives the order of the steps and a
          hypothesis about each piece of structure; a run measures how much each is worth.
Question  What does each piece of structure buy, at equal data and equal compute?
Data      `cldr_translate/en_de`, as in first_light: short inputs, short targets, two languages.
Command   twinstack run ladder
Sizes     d_ff makes the training FLOPs of all rungs equal. Parameters differ: sharing removes some.
Rates     One learning rate for all rungs, the best of both arms in first_light's sweep; no rung was tuned.

One seed cannot show the effect of a rung. This run shows that the whole path trains, what each rung costs, and one
outcome. Intervals over seeds and all 16 combinations are left to another experiment.
"""

import dataclasses

from common.compute.matching import match_training_flops
from common.report.claims import Parity
from common.train.config import Budget, Linear
from experiments.first_light import first_light
from experiments.run import Evaluation, MultiTurn
from experiments.study import Study
from t5like.config import RUNGS, T5LikeConfig

HYPOTHESES = {
    "0-enc-dec": "The encoder-decoder, nothing removed.",
    "1-merged": "Self-attention can serve as cross-attention too: the mildest change.",
    "2-shared": "Own parameters for inputs and targets help where the two really differ, as in translation.",
    "3-layerwise": "Reading only the last encoder layer is a bottleneck, which should bite at great depth.",
    "4-causal": "Bidirectional inputs matter less with scale, and cost the reuse of a conversation's cache.",
}


def ladder() -> Study:
    base = first_light()
    before, sibling = base.arms["t5like"], base.arms["gpt"].model
    rung0 = before.model
    assert isinstance(rung0, T5LikeConfig)
    train = dataclasses.replace(
        before.train,
        budget=Budget(unit="steps", amount=800),
        schedule=Linear(warmup_steps=60),
        validate_every=100,
        checkpoint_every=400,
    )
    evaluation = Evaluation(
        splits=("test",),
        examples=1000,
        rows=125,
        max_new_tokens=64,
        validation_batches=32,
        multi_turn=MultiTurn(turns=8, message_tokens=64, reply_tokens=64, repeats=5),
    )
    arms = {}
    for (name, hypothesis), switches in zip(HYPOTHESES.items(), RUNGS, strict=True):
        own = dataclasses.replace(rung0, **switches)
        model = match_training_flops(own, sibling, before.data.length_sums, multiple=8)
        arms[name] = dataclasses.replace(
            before, model=model, train=train, evaluation=evaluation, labels={"rung": name}, about=hypothesis
        )
    return dataclasses.replace(
        base,
        name="ladder",
        question="From encoder-decoder to decoder-only in four steps: what does each piece of structure buy?",
        expected=(
            "Seen on 2 cores of an AMD EPYC (2026-11-23, one seed): exact match 91, 81, 66, 53 and 86 % of rungs "
            "0 to 4 on 1,000 held-out phrases."
        ),
        parity=(
            Parity(
                apart=("model.cross_attention", "model.parameters", "model.memory", "model.input_attention"),
            ),
        ),
        arms=arms,
    )
