"""Encoders that write: language models that read their source in both directions (UniLM).

The source attends to all of itself, the target to the source and to its own past (Dong et al.,
arXiv:1905.03197). Each token of the target is predicted at the token before it, the first one at
the source's last.

Shape suffixes in this file:
    B sequences   Q tokens that are computed   S tokens of source and target, padded
    N tokens that are learnt   C vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertLMHeadModel,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaForCausalLM,
    XLMRobertaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from minilm_exp.attention import TRAINING_ATTENTION
from minilm_exp.errors import ExperimentError
from minilm_exp.head_terms import NO_LABEL
from minilm_exp.task_settings import WRITERS

# Attention functions that read a mask of truth values; others add their mask to the scores.
_READ_TRUTH = ("sdpa", TRAINING_ATTENTION)


def prefix_mask(attention_mask_BS: Tensor, source_mask_BS: Tensor, num_queries: int) -> Tensor:
    """Which token sees which, (B, Q, S), for the last `num_queries` tokens.

    Nobody sees padding. What stands in the place of padding sees the source, so that no row is
    empty.

    Args:
        attention_mask_BS: 1 for real tokens.
        source_mask_BS: 1 for tokens of the source.
        num_queries: So many at the end.
    """
    num_tokens = attention_mask_BS.shape[1]
    places_S = torch.arange(num_tokens, device=attention_mask_BS.device)
    is_past_QS = places_S <= places_S[num_tokens - num_queries :, None]
    is_seen_BQS = is_past_QS | source_mask_BS.bool()[:, None, :]
    return is_seen_BQS & attention_mask_BS.bool()[:, None, :]


class PrefixLM(PreTrainedModel):
    """Gives a decoder class of transformers the prefix mask.

    Positions run on over source and target; the target has the second segment where the
    architecture has two. All of it follows from two masks, so the library's `generate` computes the
    source once and then one token a step. The output embeddings are the input embeddings.

    What it saves is an encoder like any other, which `AutoModel` reads in both directions.
    """

    head_name = "cls"
    # Whether positions begin after the padding id.
    counts_from_padding = False

    def __init__(self, config: PreTrainedConfig) -> None:
        # The library keeps no cache for what is no decoder.
        config.is_decoder = True
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor,
        source_mask: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token that follows each one.

        Args:
            input_ids: (B, Q), those that are not in the cache.
            source_mask: 1 for tokens of the source; (B, S), or shorter: the rest is the target.
            attention_mask: (B, S), 1 for real tokens; padding may stand on either side. None where
                all are real.
            labels: (B, S); logits are then (N, C), of the places that have a label, row by row.
            past_key_values: The cache of the tokens before.
            use_cache: Whether tokens are kept in it.
            logits_to_keep: Of so many tokens at the end; 0: of all.
        """
        num_queries = input_ids.shape[1]
        if attention_mask is None:  # the library's `generate` leaves out one that masks nothing
            num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
            attention_mask = input_ids.new_ones(len(input_ids), num_past + num_queries)
        num_tokens = attention_mask.shape[1]
        is_source_BS = nn.functional.pad(source_mask, (0, num_tokens - source_mask.shape[1])).bool()
        mask_BQS = prefix_mask(attention_mask, is_source_BS, num_queries)
        if self.config._attn_implementation not in _READ_TRUTH:
            lowest = torch.finfo(self.dtype).min
            mask_BQS = torch.zeros_like(mask_BQS, dtype=self.dtype).masked_fill(~mask_BQS, lowest)
        positions_BS = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        if self.counts_from_padding:
            positions_BS = positions_BS + self.config.pad_token_id + 1
        segments_BS = (~is_source_BS).long() * (self.config.type_vocab_size > 1)
        output = self.base_model(
            input_ids,
            attention_mask=mask_BQS[:, None],
            position_ids=positions_BS[:, -num_queries:],
            token_type_ids=segments_BS[:, -num_queries:],
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
        )
        states = output.last_hidden_state
        # Logits of the whole source would cost a small model more than all of its layers.
        states = states[:, -logits_to_keep:] if labels is None else states[labels != NO_LABEL]
        logits = getattr(self, self.head_name)(states)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)

    def save_pretrained(self, *given: Any, **named: Any) -> None:
        self.config.is_decoder = False
        try:
            super().save_pretrained(*given, **named)
        finally:
            self.config.is_decoder = True


class BertPrefixLM(PrefixLM, BertLMHeadModel):
    """BERT."""


class RobertaPrefixLM(PrefixLM, RobertaForCausalLM):
    """RoBERTa."""

    head_name = "lm_head"
    counts_from_padding = True


class XLMRobertaPrefixLM(PrefixLM, XLMRobertaForCausalLM):
    """XLM-RoBERTa."""

    head_name = "lm_head"
    counts_from_padding = True


_CLASSES = dict(zip(WRITERS, (BertPrefixLM, RobertaPrefixLM, XLMRobertaPrefixLM)))


def prefix_lm_class(model_type: str) -> type[PrefixLM]:
    """The class of an architecture.

    Raises:
        ExperimentError: It has none.
    """
    if model_type not in _CLASSES:
        raise ExperimentError(f"{model_type} cannot write; generation has {', '.join(_CLASSES)}")
    return _CLASSES[model_type]


def target_loss(logits_NC: Tensor, labels_BS: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of the target's tokens with its closing one, the mean over all of a batch.

    Smoothing gives its share to all tokens of the vocabulary alike (s2s-ft: to all but the right
    one and padding).
    """
    return nn.functional.cross_entropy(
        logits_NC.float(), labels_BS[labels_BS != NO_LABEL], label_smoothing=label_smoothing
    )
