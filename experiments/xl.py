"""T5-XL and a decoder-only model of equal training FLOPs, on C4, for a pod slice of 256 TPU v5e.

Source    T5 v1.1 (arXiv 1910.10683; T5X's t5_1_1 xl): sizes, batch, objective, optimizer and schedule.
Question  At equal training FLOPs and at the scale of a pod slice: which family predicts spans better?
Data      `tfds:c4/en` with span corruption, 512 inputs and 114 targets a row; TFDS must have prepared it.
Command   twinstack plan xl --topology v5e:16x16    (no data and no TPU needed; `pip install twinstack[plan]`)
          twinstack run xl                          (on the slice)
Sizes     T5-XL as published. The decoder-only model has its width, its heads and the depth of one of its stacks; d_ff
          makes training FLOPs equal.
Rates     T5's schedule, the same for both; not swept.
Budget    20 tokens per parameter of T5-XL (arXiv 2203.15556).
Expected  Not run: no TPU was at hand. `plan` reports the compiler's memory and an estimated time, not measurements.
"""

from common.compute.matching import match_training_flops
from common.data.config import DataConfig, SentencePieceConfig
from common.data.objectives.config import SpanCorruption
from common.data.sources.config import SourceConfig
from common.recipe import Execution
from common.report.claims import Parity
from common.sharding.shape import MeshShape
from common.train.config import Adafactor, Budget, InverseSqrt, TrainConfig
from experiments.families import GPT, T5LIKE
from experiments.run import Evaluation, Run
from experiments.study import Study


def xl() -> Study:
    data = DataConfig(
        source=SourceConfig(name="tfds:c4/en", inputs=None, targets=None, text="text"),
        tokenizer=SentencePieceConfig(vocab_size=32_100, sentinels=100),
        objective=SpanCorruption(),
        rows=2048,
        input_length=512,
        target_length=114,
    )
    t5like = T5LIKE.sizes["t5-v1.1-xl"]
    gpt = GPT.sized(width=2048, layers=24, d_ff=5120, vocab_size=t5like.vocab_size, recipe=t5like.recipe)
    train = TrainConfig(
        budget=Budget(unit="tokens", amount=20.0 * t5like.param_count()),
        optimizer=Adafactor(),
        schedule=InverseSqrt(),
        validate_every=1000,
        checkpoint_every=1000,
        mesh=MeshShape(fsdp=256),
        # One kernel block of 640 covers all 626 slots; two of 384 would compute half as much again.
        execution=Execution(dtype="bfloat16", remat="full", attention_block=512, attention_kernel_block=640),
    )
    gpt = match_training_flops(gpt, t5like, data.length_sums, multiple=128)
    return Study(
        name="xl",
        question="At equal training FLOPs and at the scale of a pod slice: which family predicts spans better?",
        expected="Not run: no TPU was at hand.",
        parity=(Parity(apart=("model.input_attention",)),),
        arms={
            model.kind: Run(
                model=model,
                learning_rate=1.0,
                data=data,
                train=train,
                evaluation=Evaluation(validation_batches=8),
                labels={"family": model.kind},
            )
            for model in (t5like, gpt)
        },
    )
