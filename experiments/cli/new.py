"""`twinstack new`: writes a study to start from."""

import csv
import json
import re
from pathlib import Path

from common.data.config import SentencePieceConfig
from common.data.tokenizers.sentence_piece import train_model
from common.errors import UserError
from common.files import user_lines, user_rows, write_atomically
from common.terminal import harmless

DATES = 'SourceConfig(name="tfds:cldr_translate/en_de", inputs="en", targets="de", group="kind")'
TEMPLATE = '''"""{name}: one line on what this study is about.

Question  What do you want to know?
Command   twinstack run {file}
Expected  What do you expect, and why? Write it down before you run it.
"""

from itertools import product

from twinstack import (
    GPT,
    T5LIKE,
    Budget,
    DataConfig,
    Evaluation,
    Execution,
    Linear,
    Parity,
    Recipe,
    Run,
    Search,
    SentencePieceConfig,
    SourceConfig,
    Study,
    Supervised,
    TrainConfig,
    match_training_flops,
)

TABLE_ROWS = {rows}  # the vocabulary, rounded up to a multiple of 128
DATA = DataConfig(
    source={source},
    tokenizer=SentencePieceConfig(vocab_size={vocab_size}),
    objective=Supervised(),
    rows=8,  # rows of a batch; a row holds several short examples
    input_length=64,
    target_length=64,
)
TRAIN = TrainConfig(
    budget=Budget(unit="steps", amount=100),
    schedule=Linear(warmup_steps=10),
    validate_every=50,
    checkpoint_every=1000,
    execution=Execution(dtype="float32", scan_layers=False),  # on a TPU: dtype="bfloat16"
)
EVALUATION = Evaluation(splits=("test",), examples=100, max_new_tokens=32, validation_batches=4)


def study() -> Study:
    arms = {{}}
    for family, width in product((GPT, T5LIKE), (32, 64)):
        recipe = Recipe(positions="rope", mlp="swiglu", init="fan_in")
        model = family.sized(width=width, layers=2, vocab_size=TABLE_ROWS, recipe=recipe)
        sibling = GPT.sized(width=width, layers=2, vocab_size=TABLE_ROWS, recipe=recipe)
        arms[f"{{family.kind}}-{{width}}"] = Run(
            model=match_training_flops(model, sibling, DATA.length_sums, multiple=8),  # equal compute at each width
            learning_rate=4e-3,
            data=DATA,
            train=TRAIN,
            evaluation=EVALUATION,
            labels={{"family": family.kind, "width": width}},
        )
    return Study(
        name={name!r},
        question="What do you want to know?",
        arms=arms,
        seeds=1,  # at least 3 before a difference can be called resolved: twinstack run {file} seeds=3
        search=None,  # or Search(rates=(2e-3, 4e-3, 8e-3)): tunes every arm alike
        parity=(Parity(over=("family",), apart=("model.input_attention",)),),
    )
'''


VOCAB_SIZES = (4096, 2048, 1024, 512, 384, 320, 300, 288, 280, 272, 264)
"""Sizes of the vocabulary to try on a user's file, which must fill it."""
ROWS_MULTIPLE = 128
SAMPLED = 20_000
"""Records of a user's file that decide the size of the vocabulary."""


def new(*, name: str, data: Path | None) -> None:
    """Writes NAME.py, a study on the pairs in `data`, or on phrases that need no download. Never overwrites a file."""
    stem = name.removesuffix(".py")
    if not re.fullmatch(r"[A-Za-z]\w*", stem, flags=re.ASCII):
        raise UserError(f"{name!r} must be a name of letters, digits and underscores, such as my_study")
    path = Path(f"{stem}.py")
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or remove it")
    source, vocab_size = (DATES, 1024) if data is None else _source(data)
    rows = -(-vocab_size // ROWS_MULTIPLE) * ROWS_MULTIPLE
    text = TEMPLATE.format(name=stem, file=path, source=source, vocab_size=vocab_size, rows=rows)
    write_atomically(path, text.encode())
    print(harmless(f"{path} is written: edit it, then `twinstack plan {path}` and `twinstack run {path}`"))


def _source(data: Path) -> tuple[str, int]:
    """Returns the source of a user's file, and how large a vocabulary its text fills.

    The source has the file's first two columns, with a twentieth held out for each of validation and test.
    """
    records = _records(data)
    columns = list(records[0]) if records else []
    if len(columns) < 2:
        raise UserError(f"{data} has the columns {', '.join(columns) or '(none)'}: pairs need two")
    kind = "tsv" if data.suffix == ".tsv" else "jsonl"
    inputs, targets = (json.dumps(column, ensure_ascii=False) for column in columns[:2])
    name = json.dumps(f"{kind}:{data.resolve()}", ensure_ascii=False)
    texts = [str(record.get(column, "")) for record in records for column in columns[:2]]
    source = f"SourceConfig(name={name}, inputs={inputs}, targets={targets}, held_out=0.05)"
    return source, _vocab_size(texts)


def _vocab_size(texts: list[str]) -> int:
    """Returns the largest size that four fifths of the texts fill: some are held out. Raises UserError if none."""
    some = [text for i, text in enumerate(texts[: 2 * SAMPLED]) if i % 5]
    for size in VOCAB_SIZES:
        try:
            train_model(some, SentencePieceConfig(vocab_size=size))
        except UserError as error:
            refusal = error
        else:
            return size
    raise refusal


def _records(data: Path) -> list[dict[str, str]]:
    if data.suffix == ".tsv":
        return list(csv.DictReader(user_lines(data), delimiter="\t", quoting=csv.QUOTE_NONE))
    if data.suffix == ".jsonl":
        return user_rows(data)
    raise UserError(f"{data}: pairs are read from .tsv with a header, or .jsonl; nearest: {data.stem}.tsv")
