"""The policy: a model that can answer. It generates texts and scores them, and keeps the programs that it compiles."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from common.compute.model_config import ModelConfig
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.infer.config import GREEDY, GenerationConfig, Limits, Method
from common.infer.generate import Completion, Generator, Request
from common.infer.score import LENGTHS, Pair, Score, check_fits, mean_loss, score
from common.infer.scored_texts import FORMS_IN_WORDS, has_one_form, to_pair
from common.infer.texts import TextCodec, encode_prompt, tokenizer_of
from common.model import Skeleton
from common.ranges import Rows
from common.recipe import Execution
from common.sharding.shape import ROW_AXES

Ids = Sequence[int]
Scorable = str | tuple[str | Ids, str | Ids] | Mapping[str, str | Ids]
"""A text; a pair of inputs and targets; or one of the forms of `common.infer.scored_texts`."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Policy:
    """A model with its parameters, ready to generate and to score.

    The first call with texts of a new length compiles; later calls with about as many texts, of about the same length,
    do not.
    """

    config: ModelConfig
    model: Skeleton
    params: Any
    """Nested dict, sharded over `mesh`."""
    mesh: Mesh
    text: TextCodec
    execution: Execution
    origin: str
    """Where the model was found, with the step of a run."""

    def __repr__(self) -> str:
        return f"<{self.origin}: {self.config.param_count():,} parameters, computes in {self.execution.dtype}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UserError if there is none."""
        return tokenizer_of(self.text)

    def generate(
        self,
        prompts: Sequence[str],
        method: Method = GREEDY,
        *,
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        stop: Sequence[str] = (),
        samples: int = 1,
        seed: int = 0,
        rows: int = 8,
    ) -> list[str]:
        """Returns a text for each prompt, in order; with `samples`, so many texts of the first prompt, then the next's.

        A text depends on its prompt and the seed, not on the other prompts. Beam search may find fewer texts than
        `samples`; the missing ones are empty.

        Args:
            prompts: texts, in which sentinels such as `<extra_id_0>` are single tokens.
            method: `Greedy()`, `Sample(temperature=0.8)` or `Beam(size=4)`.
            max_new_tokens: the longest text, with its end token.
            min_new_tokens: no end token is generated before this many tokens.
            stop: a text is cut before the first of these strings.
            samples: texts per prompt.
            seed: of sampling.
            rows: most prompts that each device decodes at a time.

        Raises:
            UserError: for options that exclude each other, a prompt that is too long, and a model without a tokenizer.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text: give a list of texts; nearest: [prompt]")
        limits = Limits(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop=tuple(stop))
        how = GenerationConfig(method=method, limits=limits, seed=seed, samples=samples, rows=rows)
        encoded = [encode_prompt(prompt, self.text) for prompt in prompts]
        requests = [Request(prompt=prompt, sample=n) for prompt in encoded for n in range(how.decodings)]
        texts = [""] * (len(prompts) * samples)
        for i, completions in self.complete(requests, how):
            first = i * samples // how.decodings
            texts[first : first + len(completions)] = [completion.text for completion in completions]
        return texts

    def complete(
        self,
        requests: Sequence[Request],
        how: GenerationConfig,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields each request's texts as they are finished, with tokens and log-probabilities: `Generator.complete`."""
        return self._generator.complete(requests, how, on_text)

    def score(
        self, pairs: Sequence[Scorable], *, eos: bool = False, rows: int = 8, lengths: Sequence[int] = LENGTHS
    ) -> list[Score]:
        """Returns the log-likelihood of each pair's targets, token by token and as a sum, in order.

        Args:
            pairs: (inputs, targets); a text alone is scored as a language model's. Other forms are dicts:
                `common.infer.scored_texts`. Each part is a text or a list of token ids.
            eos: whether the end token of the targets is scored too, as objectives with one learn it.
            rows: most packed rows that each device scores at a time.
            lengths: allowed lengths of rows, in tokens; the longest limits inputs and targets.

        Raises:
            UserError: naming the pair that cannot be read, or does not fit.
        """
        return self.score_pairs(self._encode(pairs, eos, max(lengths)), rows=rows, lengths=lengths)

    def loss(self, pairs: Sequence[Scorable], *, eos: bool = False) -> float:
        """Returns the cross-entropy of the pairs' targets, in nats per token; 0 if there are none.

        With `eos`, it is what a validation split of these pairs would show, for objectives that end targets so.
        """
        return mean_loss(self.score(pairs, eos=eos))

    def encode_pair(self, record: Mapping[str, Any], *, eos: bool, longest: int) -> Pair:
        """Encodes a record of one of the forms. Raises UserError if it cannot be read, or is longer than `longest`."""
        encoded = to_pair(record, self.text, self.config.vocab_size, eos=eos)
        check_fits("it", encoded, longest, self.model)
        return encoded

    def score_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        rows: int,
        lengths: Sequence[int],
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Score]:
        """As `score`, for pairs that are encoded; `advance` is called with the number of pairs just scored."""
        typing.get_args(Rows)[1].check("rows", rows)
        return score(
            self.model,
            self.params,
            self.mesh,
            pairs,
            execution=self.execution,
            rows=min(rows, max(len(pairs), 1)) * math.prod(self.mesh.shape[axis] for axis in ROW_AXES),
            lengths=lengths,
            advance=advance,
        )

    def _encode(self, pairs: Sequence[Scorable], eos: bool, longest: int) -> list[Pair]:
        if isinstance(pairs, str):
            raise UserError("pairs is one text: give a list of pairs or texts; nearest: [text]")
        encoded = []
        for i, scorable in enumerate(pairs):
            try:
                encoded.append(self.encode_pair(_as_record(scorable), eos=eos, longest=longest))
            except UserError as error:
                raise UserError(f"pairs[{i}]: {error}") from None
        return encoded

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.model, self.params, self.mesh, self.text)


def _as_record(scorable: Scorable) -> Mapping[str, Any]:
    """Returns one of the forms. Raises UserError for anything else."""
    match scorable:
        case str():
            return {"text": scorable}
        case (inputs, targets) if isinstance(scorable, tuple):
            return {"inputs": inputs, "targets": targets}
        case Mapping() if has_one_form(scorable):
            return scorable
    raise UserError(f"it must be a text, a tuple (inputs, targets), or a dict with {FORMS_IN_WORDS}")
