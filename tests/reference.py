"""A slow second opinion on the relation loss, to test the fast one against."""

import math

import torch


def relation_loss_reference(teacher, student, pairs, num_relation_heads, attention_mask=None):
    """Equations 5 to 8 of MiniLMv2 (arXiv:2012.15828), one sequence, head and token at a time.

    Everything is float64. Padding is dropped before any arithmetic, so that nothing here is
    masked, and a sequence divides by the number of tokens that it really has. The value of a batch
    is the mean over its sequences. Autograd through the loops gives the reference gradient.
    """
    num_sequences = len(student[pairs[0][0]])
    total = torch.zeros((), dtype=torch.float64)
    for first, second in pairs:
        for b in range(num_sequences):
            num_positions = student[first].shape[1]
            real = [
                t for t in range(num_positions) if attention_mask is None or attention_mask[b, t]
            ]
            summed = torch.zeros((), dtype=torch.float64)
            for head in range(num_relation_heads):
                for t in real:
                    p = _row(teacher, first, second, b, head, t, real, num_relation_heads)
                    q = _row(student, first, second, b, head, t, real, num_relation_heads)
                    for u in range(len(real)):
                        summed = summed + p[u].detach() * (p[u].detach().log() - q[u].log())
            total = total + summed / (num_relation_heads * len(real)) / num_sequences
    return total


def _row(states, first, second, b, head, t, real, num_relation_heads):
    """The distribution of one token of one relation head over the real tokens."""
    query = _piece(states[first][b, t], head, num_relation_heads)
    scores = [
        (query * _piece(states[second][b, u], head, num_relation_heads)).sum()
        / math.sqrt(len(query))
        for u in real
    ]
    highest = max(score.item() for score in scores)
    weights = [(score - highest).exp() for score in scores]
    return [weight / sum(weights) for weight in weights]


def _piece(vector, head, num_relation_heads):
    size = len(vector) // num_relation_heads
    return vector[head * size : (head + 1) * size].double()
