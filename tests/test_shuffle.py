"""The order of the examples."""

import itertools

import pytest

from minilm_exp.shuffle import ShuffleSampler


def order(num_examples, num_drawn=None, seed=1, epoch=0):
    sampler = ShuffleSampler(num_examples, num_drawn or num_examples, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("num_examples", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097, 70_000])
def test_every_example_once(num_examples):
    """An example drawn twice, and another never."""
    assert sorted(order(num_examples)) == list(range(num_examples))


def test_fewer_than_all_are_a_part_of_the_order():
    """Only the first examples of the corpus drawn where an epoch is cut to whole steps."""
    assert order(1000, 900) == order(1000)[:900]
    assert max(order(1000, 900)) > 900
    assert len(ShuffleSampler(1000, 900, 1)) == 900


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    """The same order in every epoch, or another one after a resume."""
    assert order(100) == order(100)
    orders = {tuple(order(100, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_has_no_pattern():
    """Neighbours that stay together, or positions that hardly move."""
    num_examples = 10_000
    drawn = order(num_examples)
    neighbours = sum(abs(a - b) <= 10 for a, b in itertools.pairwise(drawn))
    assert neighbours < 60  # 20 expected
    mean_distance = sum(abs(place - number) for place, number in enumerate(drawn)) / num_examples
    assert abs(mean_distance - num_examples / 3) < 0.03 * num_examples
    halves = sum(number < num_examples / 2 for number in drawn[: num_examples // 2])
    assert abs(halves - num_examples / 4) < 0.02 * num_examples
