"""Span corruption: how many tokens are noise, in how many spans, which ones, and what replaces them.

Follows Raffel et al. 2020 (arXiv 1910.10683), section 3.1.4 and figure 2, and the code published with the paper: a text
begins with kept tokens and ends with noise, so the targets need no sentinel after the last span.

Legend: E examples, L tokens of a piece, N draws, S sentinels, X spans (kept and noise alternate).
"""

import dataclasses
from fractions import Fraction

import numpy as np

from common.data.objectives.draws import draw_bits, draw_subset
from common.data.ragged import Ragged

SHORTEST_PIECE = 2
"""Tokens of the shortest text: one to keep and one to corrupt."""
SHORTEST_INPUTS = 4
"""Input slots that a text of three tokens may need; in a shorter one nothing is random."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Exact counts for a text of `length` tokens: `noise` of them are cut out, in `spans` spans."""

    length: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """Input tokens: the kept ones, a sentinel for each span, eos."""
        return self.length - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Target tokens: the noise, a sentinel for each span, eos."""
        return self.noise + self.spans + 1


def count_noise(length: int, density: float, mean_span: float) -> Noise:
    """Counts the noise in a text of `length` tokens.

    Products are exact in the decimals that the floats are written as, and rounded half to even. (T5 rounds float32 in
    one place and float64 in another, and the two differ.)

    >>> count_noise(568, 0.15, 3.0)
    Noise(length=568, noise=85, spans=28)
    """
    assert length >= SHORTEST_PIECE
    noise = min(max(round(length * _exact(density)), 1), length - 1)
    spans = min(max(round(noise / _exact(mean_span)), 1), noise, length - noise)
    return Noise(length, noise, spans)


def fit_inputs(input_length: int, density: float, mean_span: float) -> Noise:
    """Counts the noise in the longest text whose inputs fit `input_length` slots.

    At density 0.5 targets may be a token longer than inputs; then the text is a token shorter.

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


def draw_masks(counts: Noise, seed: int, number_E: np.ndarray) -> np.ndarray:
    """Draws which tokens are noise, bool [E, L].

    Spans of kept and of corrupted tokens alternate. Their lengths are random; every way to cut them is equally likely.
    """
    kept, noise, spans = counts.length - counts.noise, counts.noise, counts.spans
    bits_EN = draw_bits(seed, number_E, kept + noise - 2)
    lengths_EX = np.empty((len(number_E), 2 * spans), np.int64)
    lengths_EX[:, 0::2] = _cut(bits_EN[:, : kept - 1], spans)
    lengths_EX[:, 1::2] = _cut(bits_EN[:, kept - 1 :], spans)
    alternating = np.tile([False, True], len(number_E) * spans)
    return np.repeat(alternating, lengths_EX.ravel()).reshape(-1, counts.length)


def corrupt(tokens_EL: np.ndarray, mask_EL: np.ndarray, sentinels_S: np.ndarray) -> tuple[Ragged, Ragged]:
    """Returns inputs and targets, without eos. Sentinel k replaces span k in the inputs and precedes it in the targets.

    >>> mask = np.array([[False, True, True, False, True]])
    >>> inputs, targets = corrupt(np.arange(10, 15, dtype=np.int32)[None], mask, np.array([99, 98], np.int32))
    >>> inputs[0].tolist(), targets[0].tolist()
    ([10, 99, 13, 98], [99, 11, 12, 98, 14])
    """
    return _collapse(tokens_EL, mask_EL, sentinels_S), _collapse(tokens_EL, ~mask_EL, sentinels_S)


def _collapse(tokens_EL: np.ndarray, gone_EL: np.ndarray, ids_S: np.ndarray) -> Ragged:
    """Replaces each run of tokens that are `gone` by one id of `ids_S`, in their order."""
    first_EL = gone_EL.copy()
    first_EL[:, 1:] &= ~gone_EL[:, :-1]
    spans_E = np.count_nonzero(first_EL, axis=1)
    assert spans_E.max(initial=0) <= len(ids_S), "more spans than sentinels"
    rank = np.arange(spans_E.sum()) - np.repeat(np.cumsum(spans_E) - spans_E, spans_E)
    out_EL = tokens_EL.copy()
    out_EL[first_EL] = ids_S[rank]
    stays_EL = first_EL | ~gone_EL
    return Ragged(tokens_P=out_EL[stays_EL], offsets=np.append(0, np.cumsum(np.count_nonzero(stays_EL, axis=1))))


def _cut(bits_EN: np.ndarray, parts: int) -> np.ndarray:
    """Cuts N + 1 tokens into `parts` spans of random positive lengths, int64 [E, parts].

    The draws choose which of the N gaps between neighbouring tokens are cut.
    """
    examples, gaps = bits_EN.shape
    ends_EX = np.full((examples, parts), gaps + 1, np.int64)
    ends_EX[:, :-1] = np.nonzero(draw_subset(bits_EN, parts - 1))[1].reshape(examples, parts - 1) + 1
    return np.diff(ends_EX, axis=1, prepend=0)


def _exact(value: float) -> Fraction:
    """Returns the decimal number that a float is written as."""
    return Fraction(repr(float(value)))
