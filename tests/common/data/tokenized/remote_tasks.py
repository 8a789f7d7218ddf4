"""Tokenising tasks whose shards go to a bucket in memory."""

from common.data.sources.records import Problem, Record
from common.data.tokenized.prepare import make, write_all
from common.data.tokenized.remote import destination
from common.data.tokenized.shards import ShardTask
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from tests.common.data.memory_source import MemorySource

BASE = "memory://bucket/corpus"
TEXTS = [f"{n} is {n + 1} less one" * (n % 3) for n in range(100)]
SHARDS = 7


def task_of(tokenizer: SentencePieceTokenizer, records: list[Record | Problem] | None = None) -> ShardTask:
    """Makes a task of `records`, or else of `TEXTS`, in `SHARDS` shards."""
    source = MemorySource([{"text": text} for text in TEXTS] if records is None else records)
    return ShardTask(
        source=source, fields=("text",), tokenizer=tokenizer, end_each=False, strict=False, records_a_shard=16
    )


def send(task: ShardTask, base: str = BASE, workers: int = 1) -> dict:
    """Prepares a task at a URL or in a folder, and returns the manifest."""
    return make(task, destination(base, task), lambda task, to: write_all(task, to, workers))
