"""Query, key and value states of one layer of an encoder, with nothing computed above them.

Source: MiniLMv2, arXiv:2012.15828, section 3.1: the states of all attention heads of a layer are
concatenated before they are split into relation heads.

Architectures whose attention goes through transformers' AttentionInterface are served by one
attention function that all of them share. A few do not go through it; for those the attention
module's own projections are read. Any other architecture is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from minilm_exp.attention import training_attention
from minilm_exp.errors import ExperimentError

ATTENTION_NAME = "minilm_exp_tap"


class QKVTap(nn.Module):
    """Runs an encoder up to one layer's query, key and value states and returns those.

    Neither that layer's attention and feed-forward nor any later layer is computed, so their
    weights get no gradient. States are taken as the attention uses them: after rotary position
    embedding where the architecture has it, with the key and value heads of grouped-query
    attention repeated to the number of query heads.

    Args:
        encoder: A transformers encoder without a task head. Its attention implementation is
            changed; `close` changes it back.
        layer: The layer, counted from 1 as in the papers.

    Raises:
        ExperimentError: The layer does not exist, or the architecture hands its states to nobody.
    """

    def __init__(self, encoder: PreTrainedModel, layer: int) -> None:
        super().__init__()
        num_layers = encoder.config.num_hidden_layers
        if not 1 <= layer <= num_layers:
            raise ExperimentError(
                f"layer {layer} is outside 1..{num_layers} of this {encoder.config.model_type}"
                " encoder; set layer_selection.teacher_layer"
            )
        self.encoder = encoder
        self.layer = layer
        self._calls_left = 0
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._old_implementation = encoder.config._attn_implementation
        read_states = _PROJECTIONS.get(encoder.config.model_type)
        if read_states is not None:
            self._hook = self._hook_projections(read_states)
            return
        encoder.set_attn_implementation(ATTENTION_NAME)
        if not self._each_layer_calls_attention_once():
            encoder.set_attn_implementation(self._old_implementation)
            raise _unsupported(encoder)

    def forward(self, **inputs: Tensor | None) -> dict[str, Tensor]:
        """States of the layer as {"query", "key", "value"}, each (sequences, tokens, hidden)."""
        self._calls_left = self.layer
        _active_taps.append(self)
        try:
            self.encoder(**inputs)
        except _LayerReached as reached:
            return reached.states
        finally:
            _active_taps.pop()
        raise RuntimeError("the encoder went past the tapped layer: this tap is closed")

    def close(self) -> None:
        """Gives the encoder back as it was."""
        if self._hook is not None:
            self._hook.remove()
        else:
            self.encoder.set_attn_implementation(self._old_implementation)

    def count_call(self) -> bool:
        """Whether the attention call that is being made belongs to the tapped layer."""
        self._calls_left -= 1
        return self._calls_left == 0

    def _hook_projections(self, read_states: Callable) -> torch.utils.hooks.RemovableHandle:
        attention = [
            module
            for module in self.encoder.modules()
            if type(module).__name__.endswith("SelfAttention")
        ][self.layer - 1]

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _active_taps and _active_taps[-1] is self:
                raise _LayerReached(dict(zip(_STATES, read_states(module, *args, **kwargs))))

        return attention.register_forward_pre_hook(leave, with_kwargs=True)

    def _each_layer_calls_attention_once(self) -> bool:
        if self.encoder.config._attn_implementation != ATTENTION_NAME:
            return False
        was_training = self.encoder.training
        self.encoder.eval()  # dropout would draw random numbers
        self._calls_left = 0
        _active_taps.append(self)
        try:
            with torch.no_grad():
                device = next(self.encoder.parameters()).device
                self.encoder(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
        except (TypeError, ValueError):  # an encoder-decoder, or one that reads no text
            return False
        finally:
            _active_taps.pop()
            self.encoder.train(was_training)
        return -self._calls_left == self.encoder.config.num_hidden_layers


@torch.no_grad()
def state_size(encoder: PreTrainedModel, layer: int) -> int:
    """Width of a layer's states: heads x head size, which may differ from the hidden size."""
    tap = QKVTap(encoder, layer)
    try:
        device = next(encoder.parameters()).device
        states = tap(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
        return states["query"].shape[-1]
    finally:
        tap.close()


class _LayerReached(Exception):
    """Leaves a forward pass; works for every architecture, and keeps the gradients."""

    def __init__(self, states: dict[str, Tensor]) -> None:
        super().__init__()
        self.states = states


_STATES = ("query", "key", "value")
_active_taps: list[QKVTap] = []


def _unsupported(encoder: PreTrainedModel) -> ExperimentError:
    return ExperimentError(
        f"the query, key and value states of architecture {encoder.config.model_type!r} cannot be"
        " taken: its attention does not go once a layer through transformers' AttentionInterface,"
        f" and it is not one of {sorted(_PROJECTIONS)}; choose another teacher"
    )


@torch.compiler.disable  # it counts layers and may leave the forward pass
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention that hands the tapped layer's states to the active tap."""
    if _active_taps and _active_taps[-1].count_call():
        heads = query.shape[1]
        states = (query, *(_repeat_heads(state, heads) for state in (key, value)))
        raise _LayerReached(dict(zip(_STATES, map(_merge_heads, states))))
    return training_attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def _repeat_heads(state: Tensor, num_heads: int) -> Tensor:
    num_repeats = num_heads // state.shape[1]
    return state if num_repeats == 1 else state.repeat_interleave(num_repeats, dim=1)


def _merge_heads(state: Tensor) -> Tensor:
    """(sequences, heads, tokens, head size) to (sequences, tokens, heads x head size)."""
    return state.transpose(1, 2).flatten(2)


def _read_named(query: str, key: str, value: str) -> Callable:
    def read(module: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> list[Tensor]:
        return [getattr(module, name)(hidden_states) for name in (query, key, value)]

    return read


def _read_deberta(module: Any, hidden_states: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    """One projection holds query, key and value of each head in turn; keys have no bias."""
    heads = module.transpose_for_scores(module.in_proj(hidden_states)).chunk(3, dim=-1)
    query, key, value = map(_merge_heads, heads)
    return [query + module.q_bias, key, value + module.v_bias]


def _read_roformer(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    sinusoidal_pos: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> list[Tensor]:
    shape = (*hidden_states.shape[:2], -1, module.attention_head_size)
    states = [getattr(module, name)(hidden_states).view(shape).transpose(1, 2) for name in _STATES]
    if sinusoidal_pos is not None:
        num_rotated = 3 if module.rotary_value else 2
        states[:num_rotated] = module.apply_rotary_position_embeddings(
            sinusoidal_pos, *states[:num_rotated]
        )
    return [_merge_heads(state) for state in states]


_PROJECTIONS: dict[str, Callable] = {
    "deberta": _read_deberta,
    "deberta-v2": _read_named("query_proj", "key_proj", "value_proj"),
    "megatron-bert": _read_named("query", "key", "value"),
    "mpnet": _read_named("q", "k", "v"),
    "rembert": _read_named("query", "key", "value"),
    "roformer": _read_roformer,
}
