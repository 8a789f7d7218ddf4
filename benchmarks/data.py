"""How fast tokens become batches, and text becomes tokens, each with its upper bound.

Only tokens of the corpus count, not sentinels, eos or padding.
"""

import dataclasses
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.decoder import Spread
from common.data.config import SentencePieceConfig
from common.data.examples import PieceExamples
from common.data.loader import Loader
from common.data.objectives.config import FullLM, RawText, SpanCorruption, needs_of
from common.data.packing import RowPlans
from common.data.sources.records import Record
from common.data.tokenized.prepare import prepare
from common.data.tokenized.shards import ShardTask
from common.data.tokenized.token_store import ShardWriter, TokenStream
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model

VOCAB = 32_100
CORPUS_TOKENS = 1 << 25
THREADS = 2
SHAPES: dict[str, tuple[RawText, int, int, int]] = {
    "span corruption, rows of 512 + 114": (SpanCorruption(), 128, 512, 114),
    "language model, rows of 2,048": (FullLM(), 64, 0, 2048),
}
"""(objective, rows, input slots, target slots) of a batch."""
BATCHES = 40
TEXTS, WORDS = 100_000, 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
    """Corpus tokens per second."""

    tokens_per_second: Spread
    """Into batches, with `THREADS` threads."""
    one_thread: Spread
    copying: Spread
    """Copying the same batches once in memory: the upper bound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """Characters per second."""

    ours: Spread
    """From a source into files."""
    sentence_piece: Spread
    """SentencePiece's own `encode` on the same texts: the upper bound."""
    paired: Spread
    """Ratio of the two, round by round."""


def time_making(name: str, rounds: int, advance: Callable[[int], None]) -> Making:
    """Times the batches of one of `SHAPES`; calls `advance(1)` after each round."""
    objective, rows, input_length, target_length = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        loader = _loader(Path(folder), objective, rows, input_length, target_length)
        piece = needs_of(objective, input_length, target_length).piece
        tokens = BATCHES * rows * piece
        loader.batch(0)  # makes the plan
        found: dict[int, list[float]] = {THREADS: [], 1: [], 0: []}
        for number in range(rounds):
            first = number * BATCHES
            for threads in (THREADS, 1):
                begin = time.perf_counter()
                made = list(loader.iterate(first, first + BATCHES, threads=threads, buffered=BATCHES))
                found[threads].append(tokens / (time.perf_counter() - begin))
            arrays = [getattr(each.batch, field.name) for each in made for field in dataclasses.fields(each.batch)]
            begin = time.perf_counter()
            for array in arrays:
                array.copy()
            found[0].append(tokens / (time.perf_counter() - begin))
            advance(1)
    return Making(
        tokens_per_second=Spread.of(found[THREADS]), one_thread=Spread.of(found[1]), copying=Spread.of(found[0])
    )


def _loader(folder: Path, objective: RawText, rows: int, input_length: int, target_length: int) -> Loader:
    """A loader of random tokens on disk."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, 0, "text", VOCAB)
    for _ in range(CORPUS_TOKENS >> 20):
        writer.append([rng.integers(3, VOCAB - 100, 1 << 20)])
    writer.close()
    ids = types.SimpleNamespace(
        eos_id=1,
        pad_id=0,
        start_id=0,
        content_hash="",
        ordinary_ids=np.arange(3, VOCAB - 100),
        sentinels=100,
        sentinel_id=lambda k: VOCAB - 1 - k,
    )
    examples = PieceExamples(
        TokenStream.open(folder.joinpath, "text", [(CORPUS_TOKENS >> 20, CORPUS_TOKENS)]),
        piece=needs_of(objective, input_length, target_length).piece,
        objective=objective,
        seed=0,
        tokenizer=ids,
        source_content_id="random",
    )
    plans = RowPlans(examples, input_limit=input_length, target_limit=target_length, seed=0, cache_dir=None)
    return Loader(examples, plans, rows=rows)


class _Texts:
    """A source of random texts of random words."""

    content_id = "made-up"

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        letters = rng.integers(ord("a"), ord("z") + 1, (5000, 9)).astype(np.uint8)
        words = [bytes(row[:length]).decode() for row, length in zip(letters, rng.integers(2, 10, 5000), strict=True)]
        rank = np.minimum(rng.zipf(1.3, (TEXTS, WORDS)), len(words)) - 1
        self.texts = [" ".join(words[i] for i in row) for row in rank.tolist()]

    def __len__(self) -> int:
        return TEXTS

    def __getitem__(self, index: int) -> Record:
        return {"text": self.texts[index]}

    def read(self, indices: range) -> list[Record]:
        return [self[index] for index in indices]


def time_tokenizing(rounds: int, advance: Callable[[int], None]) -> Tokenizing:
    """Times tokenization; calls `advance(1)` after each round."""
    source = _Texts()
    model = train_model(source.texts[:5000], SentencePieceConfig(vocab_size=2048))
    tokenizer = SentencePieceTokenizer(model)
    task = ShardTask(source=source, fields=("text",), tokenizer=tokenizer, end_each=False, strict=True)  # type: ignore[arg-type]
    characters = sum(map(len, source.texts))
    ours, alone = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            prepare(task, Path(folder) / "tokens", workers=1)
            ours.append(characters / (time.perf_counter() - begin))
        begin = time.perf_counter()
        for first in range(0, TEXTS, 512):
            tokenizer._model.encode(source.texts[first : first + 512], return_type="numpy")
        alone.append(characters / (time.perf_counter() - begin))
        advance(1)
    paired = [a / b for a, b in zip(ours, alone, strict=True)]
    return Tokenizing(ours=Spread.of(ours), sentence_piece=Spread.of(alone), paired=Spread.of(paired))
