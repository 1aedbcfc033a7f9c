"""States that an encoder computes on its way, with nothing computed above the last that is wanted.

Query, key and value states are taken as the attention uses them: after rotary position embedding
where the architecture has it, with the key and value heads of grouped-query attention repeated to
the number of query heads. The heads of a layer are concatenated (MiniLMv2, arXiv:2012.15828,
section 3.1).

Architectures whose attention goes through transformers' AttentionInterface are served by one
attention function that all of them share. A few do not go through it; for those the attention
module's own projections are read. Any other architecture is refused. All other states are read by
forward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from minilm_exp.attention import training_attention, use_training_attention
from minilm_exp.errors import ExperimentError

ATTENTION_NAME = "minilm_exp_tap"
QKV = ("query", "key", "value")
# What a whole encoder returns, after a last norm where it has one.
OUTPUT = "last_hidden_state"
# What a head returns.
LOGITS = "logits"
SPAN_LOGITS = ("start_logits", "end_logits")
HEAD_STATES = (LOGITS, *SPAN_LOGITS)


class State(NamedTuple):
    """Names a state.

    Attributes:
        name: `query`, `key` or `value` of a layer; `hidden`, the output of a layer, of layer 0 the
            embeddings; `OUTPUT`; one of `HEAD_STATES`, where the model has a head; or the dotted
            path of a module of the encoder, whose output it is.
        layer: Counted from 1 as in the papers; 0 where the name says it all.
    """

    name: str
    layer: int = 0


class StateTap(nn.Module):
    """Runs a model until it has computed the states that are wanted, and returns those.

    What lies above the last of them is not computed, so its weights get no gradient.

    Args:
        model: A transformers encoder, or one with a head. Its attention implementation is changed;
            `close` changes it back.
        wanted: The states.

    Raises:
        ExperimentError: The model has no such state, or hands it to nobody.
    """

    def __init__(self, model: PreTrainedModel, wanted: Iterable[State]) -> None:
        super().__init__()
        self.encoder = model
        self.wanted = frozenset(wanted)
        self._qkv_layers = {layer for name, layer in self.wanted if name in QKV}
        self._reads_head = any(state.name in HEAD_STATES for state in self.wanted)
        self._states: dict[State, Tensor] = {}
        self._calls = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._old_implementation = model.config._attn_implementation
        try:
            self._check_layers()
            self._attach()
        except ExperimentError:
            self.close()
            raise

    def forward(self, **inputs: Tensor | None) -> dict[State, Tensor]:
        """The states; those of a layer are (sequences, tokens, size)."""
        self._states, self._calls = {}, 0
        _active_taps.append(self)
        try:
            output = self.encoder(**inputs)
            if self._reads_head:
                self.take({State(name): output[name] for name in HEAD_STATES if name in output})
        except _AllReached:
            pass
        finally:
            _active_taps.pop()
            states, self._states = self._states, {}
        if states.keys() != self.wanted:
            raise RuntimeError("the model did not pass all wanted states: this tap is closed")
        return states

    def close(self) -> None:
        """Gives the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        if self.encoder.config._attn_implementation != self._old_implementation:
            self.encoder.set_attn_implementation(self._old_implementation)

    def take(self, states: dict[State, Tensor]) -> None:
        """Keeps what is wanted of these, and leaves the forward pass after the last."""
        self._states |= {state: tensor for state, tensor in states.items() if state in self.wanted}
        if len(self._states) == len(self.wanted):
            raise _AllReached

    def count_call(self) -> int:
        """The layer whose attention is being computed, or 0 where its states are not wanted."""
        self._calls += 1
        return self._calls if self._calls in self._qkv_layers else 0

    def _check_layers(self) -> None:
        num_layers = self.encoder.config.num_hidden_layers
        for name, layer in sorted(self.wanted):
            lowest = 1 if name in QKV else 0
            if (name in QKV or name == "hidden") and not lowest <= layer <= num_layers:
                raise ExperimentError(
                    f"layer {layer} is outside {lowest}..{num_layers} of this"
                    f" {self.encoder.config.model_type} encoder; see layer_selection and the layers"
                    " of the objective"
                )

    def _attach(self) -> None:
        read_states = _PROJECTIONS.get(self.encoder.config.model_type)
        if not self._qkv_layers:
            use_training_attention(self.encoder)
        elif read_states is not None:
            for layer in self._qkv_layers:
                self._hook_projections(layer, read_states)
        else:
            self.encoder.set_attn_implementation(ATTENTION_NAME)
            if not self._each_layer_calls_attention_once():
                raise _unsupported(self.encoder)
        for state in self.wanted:
            if state.name == "hidden":
                self._hook_layer(state)
            elif state.name == OUTPUT:
                self._hook(self.encoder.base_model, state)
            elif state.name not in (*QKV, *HEAD_STATES):
                self._hook(_module(self.encoder.base_model, state.name), state)

    def _hook_projections(self, layer: int, read_states: Callable) -> None:
        attention = [
            module
            for module in self.encoder.modules()
            if type(module).__name__.endswith("SelfAttention")
        ][layer - 1]

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_active():
                states = read_states(module, *args, **kwargs)
                self.take({State(name, layer): state for name, state in zip(QKV, states)})

        self._hooks.append(attention.register_forward_pre_hook(take, with_kwargs=True))

    def _hook_layer(self, state: State) -> None:
        layers = layers_of(self.encoder)
        if state.layer > 0:
            self._hook(layers[state.layer - 1], state)
            return

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_active():
                self.take({state: args[0] if args else kwargs["hidden_states"]})

        self._hooks.append(layers[0].register_forward_pre_hook(take, with_kwargs=True))

    def _hook(self, module: nn.Module, state: State) -> None:
        def take(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._is_active():
                self.take({state: output if isinstance(output, Tensor) else output[0]})

        self._hooks.append(module.register_forward_hook(take))

    def _is_active(self) -> bool:
        return bool(_active_taps) and _active_taps[-1] is self

    def _each_layer_calls_attention_once(self) -> bool:
        if self.encoder.config._attn_implementation != ATTENTION_NAME:
            return False
        was_training = self.encoder.training
        self.encoder.eval()  # dropout would draw random numbers
        wanted, self._qkv_layers, self._calls = self._qkv_layers, set(), 0
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
            self._qkv_layers = wanted
        return self._calls == self.encoder.config.num_hidden_layers


def qkv_states(layer: int) -> list[State]:
    """Query, key and value of a layer."""
    return [State(name, layer) for name in QKV]


def layers_of(encoder: PreTrainedModel) -> nn.ModuleList:
    """The list of the encoder's Transformer layers.

    Raises:
        ExperimentError: There is none, as where all layers share their weights.
    """
    num_layers = encoder.config.num_hidden_layers
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ExperimentError(
        f"{encoder.config.model_type} has no list of {num_layers} layers of their own"
    )


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        tops = ", ".join(name for name, _ in model.named_children())
        raise ExperimentError(
            f"{type(model).__name__} has no module {path!r} (it begins with one of {tops}); see the"
            " modules of the objective"
        ) from error


@torch.no_grad()
def state_size(encoder: PreTrainedModel, state: State) -> int:
    """Width of a state; that of Q, K and V is heads x head size, not always the hidden size."""
    tap = StateTap(encoder, [state])
    was_training = encoder.training
    encoder.eval()
    try:
        device = next(encoder.parameters()).device
        states = tap(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
        return states[state].shape[-1]
    except RuntimeError as error:
        raise ExperimentError(
            f"{state.name} of {type(encoder).__name__} is never computed: name a module that is"
            " called, not a list of modules"
        ) from error
    finally:
        encoder.train(was_training)
        tap.close()


class _AllReached(Exception):
    """Leaves a forward pass; works for every architecture, and keeps the gradients."""


_active_taps: list[StateTap] = []


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
    """Attention that hands the wanted layers' states to the active tap."""
    if _active_taps and (layer := _active_taps[-1].count_call()):
        heads = query.shape[1]
        states = (query, *(_repeat_heads(state, heads) for state in (key, value)))
        _active_taps[-1].take(dict(zip(qkv_states(layer), map(_merge_heads, states))))
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
    states = [getattr(module, name)(hidden_states).view(shape).transpose(1, 2) for name in QKV]
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
