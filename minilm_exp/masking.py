"""Tokens that masked language modelling predicts."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError
from minilm_exp.head_terms import NO_LABEL

SELECTED = 0.15


class Masker:
    """Selects 15% of the tokens; of those 80% become the mask, 10% another token, 10% stay.

    As BERT does it (arXiv:1810.04805, section 3.1): the other token is any of the vocabulary.
    Special tokens and padding are never selected, and one token of a sequence at least. What is
    selected depends on the seed, the step and the number of the example, so a resumed run and one
    with other micro-batches select the same.

    Args:
        tokenizer: Of both models.
        seed: Of the run.

    Raises:
        ExperimentError: The tokenizer has no mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        if tokenizer.mask_token_id is None:
            raise ExperimentError(
                "the tokenizer has no mask token, which masked language modelling needs: choose"
                " another teacher, or an objective without the terms logits and labels"
            )
        self.mask_id = tokenizer.mask_token_id
        self.special_ids = torch.tensor(sorted(tokenizer.all_special_ids))
        self.num_tokens = len(tokenizer)
        self.seed = seed

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, index: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Masked ids and labels (B, S), which are `NO_LABEL` where nothing is predicted.

        Args:
            input_ids: Tokens (B, S).
            attention_mask: Of the tokens that are no padding (B, S), or None.
            index: Numbers of the examples (B).
            step: Of the training; any fixed number for validation.
        """
        ids = input_ids.cpu()
        selectable = ~torch.isin(ids, self.special_ids)
        if attention_mask is not None:
            selectable &= attention_mask.bool().cpu()
        masked, labels = ids.clone(), torch.full_like(ids, NO_LABEL)
        for row, number in enumerate(index.tolist()):
            places = selectable[row].nonzero()[:, 0]
            if not len(places):
                continue
            generator = torch.Generator().manual_seed(
                xxhash.xxh3_64_intdigest(f"{self.seed} {step} {number}".encode()) >> 1
            )
            draws = torch.rand(len(places), 2, generator=generator)
            others = torch.randint(self.num_tokens, (len(places),), generator=generator)
            is_selected = draws[:, 0] < SELECTED
            is_selected[draws[:, 0].argmin()] = True
            chosen = places[is_selected]
            labels[row, chosen] = ids[row, chosen]
            fate = draws[is_selected, 1]
            masked[row, chosen[fate < 0.8]] = self.mask_id
            is_other = fate >= 0.9
            masked[row, chosen[is_other]] = others[is_selected][is_other]
        return masked.to(input_ids.device), labels.to(input_ids.device)
