"""A new order of the examples for every epoch, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
from torch.utils.data import Sampler

_NUM_ROUNDS = 6
_CHUNK = 4096


class ShuffleSampler(Sampler[int]):
    """Numbers below `num_examples` in an order that seed and epoch decide.

    torch's RandomSampler holds the whole permutation as Python integers: 40 bytes an example, a
    gigabyte for a corpus of 10 GB. This one computes it: a Feistel network permutes the numbers
    below a power of four, and one that lands outside of the examples is sent through it again
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        num_examples: At least 1.
        num_drawn: How many of them make up an epoch.
        seed: Any integer from 0.
    """

    def __init__(self, num_examples: int, num_drawn: int, seed: int) -> None:
        self.num_examples = num_examples
        self.num_drawn = num_drawn
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_drawn

    def __iter__(self) -> Iterator[int]:
        keys = numpy.random.default_rng([self.seed, self.epoch]).integers(
            2**64, size=_NUM_ROUNDS, dtype=numpy.uint64
        )
        half_bits = max(1, -(-(self.num_examples - 1).bit_length() // 2))
        for start in range(0, self.num_drawn, _CHUNK):
            stop = min(start + _CHUNK, self.num_drawn)
            numbers = _permute(numpy.arange(start, stop, dtype=numpy.uint64), keys, half_bits)
            while (outside := numbers >= self.num_examples).any():
                numbers[outside] = _permute(numbers[outside], keys, half_bits)
            yield from numbers.tolist()


def _permute(numbers: numpy.ndarray, keys: numpy.ndarray, half_bits: int) -> numpy.ndarray:
    """A permutation of the numbers below 4 ** half_bits."""
    bits, mask = numpy.uint64(half_bits), numpy.uint64(2**half_bits - 1)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(numbers: numpy.ndarray) -> numpy.ndarray:
    """The finaliser of splitmix64: every bit of the input changes every bit of the output."""
    numbers = (numbers ^ (numbers >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> numpy.uint64(31))
