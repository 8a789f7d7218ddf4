"""Span corruption: how many tokens are noise, in how many spans, which ones, and what takes their place.

Raffel et al. 2020 (arXiv 1910.10683), section 3.1.4 and figure 2, as the code published with it does it: a text begins
with tokens that are kept and ends with noise, so that no sentinel stands behind the last span.

Legend: E examples, L tokens of a raw text, S sentinels, X spans, kept ones and noise.
"""

import dataclasses
from fractions import Fraction

import numpy as np

from common.data.objectives.draws import draw_bits, draw_subset
from common.data.ragged import Ragged

SHORTEST_PIECE = 2
"""Tokens of a text that has something to keep and something to corrupt."""
SHORTEST_INPUTS = 4
"""Input slots that a text of three tokens, the shortest with something to choose, may need."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Exact counts for a raw text of a given length."""

    length: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """Input tokens: what is kept, one sentinel a span, eos."""
        return self.length - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Target tokens: the noise, one sentinel a span, eos."""
        return self.noise + self.spans + 1


def count_noise(length: int, density: float, mean_span: float) -> Noise:
    """Rounds the decimal numbers that the floats are written as, half to even: T5 rounds float32 in one place and
    float64 in another, which differ.

    >>> count_noise(568, 0.15, 3.0)
    Noise(length=568, noise=85, spans=28)
    """
    assert length >= SHORTEST_PIECE
    noise = min(max(round(length * _exact(density)), 1), length - 1)
    spans = min(max(round(noise / _exact(mean_span)), 1), noise, length - noise)
    return Noise(length, noise, spans)


def fit_inputs(input_length: int, density: float, mean_span: float) -> Noise:
    """Of the longest raw text whose inputs fit into `input_length` slots.

    At density 0.5 targets may come out a token longer than that; then the text is a token shorter.

    >>> found = fit_inputs(512, 0.15, 3.0)
    >>> found.length, found.targets
    (568, 114)
    """
    assert input_length >= SHORTEST_INPUTS
    found = count_noise(input_length - 1, density, mean_span)
    while (longer := count_noise(found.length + 1, density, mean_span)).inputs <= input_length:
        found = longer
    if density == 0.5 and found.targets > input_length:
        found = count_noise(found.length - 1, density, mean_span)
    return found


def draw_masks(counts: Noise, seed: int, index_E: np.ndarray) -> np.ndarray:
    """bool [E, L]: which tokens are noise. Kept and corrupted tokens alternate in spans of random lengths, each way of
    cutting them being as likely as any other."""
    kept, noise, spans = counts.length - counts.noise, counts.noise, counts.spans
    bits_EN = draw_bits(seed, index_E, kept + noise - 2)
    lengths_EX = np.empty((len(index_E), 2 * spans), np.int64)
    lengths_EX[:, 0::2] = _cut(bits_EN[:, : kept - 1], spans)
    lengths_EX[:, 1::2] = _cut(bits_EN[:, kept - 1 :], spans)
    alternating = np.tile([False, True], len(index_E) * spans)
    return np.repeat(alternating, lengths_EX.ravel()).reshape(-1, counts.length)


def corrupt(tokens_EL: np.ndarray, mask_EL: np.ndarray, sentinels_S: np.ndarray) -> tuple[Ragged, Ragged]:
    """(inputs, targets) without eos: sentinel k stands for span k in the inputs, and before it in the targets.

    >>> mask = np.array([[False, True, True, False, True]])
    >>> inputs, targets = corrupt(np.arange(10, 15, dtype=np.int32)[None], mask, np.array([99, 98], np.int32))
    >>> inputs[0].tolist(), targets[0].tolist()
    ([10, 99, 13, 98], [99, 11, 12, 98, 14])
    """
    return _collapse(tokens_EL, mask_EL, sentinels_S), _collapse(tokens_EL, ~mask_EL, sentinels_S)


def _collapse(tokens_EL: np.ndarray, gone_EL: np.ndarray, ids_S: np.ndarray) -> Ragged:
    """Each run of tokens that are gone becomes one of the ids, in turn."""
    first_EL = gone_EL.copy()
    first_EL[:, 1:] &= ~gone_EL[:, :-1]
    spans_E = np.count_nonzero(first_EL, axis=1)
    assert spans_E.max(initial=0) <= len(ids_S), "there is an id for every span"
    rank = np.arange(spans_E.sum()) - np.repeat(np.cumsum(spans_E) - spans_E, spans_E)
    out_EL = tokens_EL.copy()
    out_EL[first_EL] = ids_S[rank]
    stays_EL = first_EL | ~gone_EL
    return Ragged(tokens_P=out_EL[stays_EL], offsets=np.append(0, np.cumsum(np.count_nonzero(stays_EL, axis=1))))


def _cut(bits_EN: np.ndarray, parts: int) -> np.ndarray:
    """Positive lengths, int64 [E, parts], that sum to N + 1; the bits choose the N places between neighbours."""
    rows, places = bits_EN.shape
    ends_EX = np.full((rows, parts), places + 1, np.int64)
    ends_EX[:, :-1] = np.nonzero(draw_subset(bits_EN, parts - 1))[1].reshape(rows, parts - 1) + 1
    return np.diff(ends_EX, axis=1, prepend=0)


def _exact(value: float) -> Fraction:
    """The decimal number that a float is written as."""
    return Fraction(repr(float(value)))
