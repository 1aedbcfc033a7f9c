"""Copies of a model for use without this framework: ONNX, and with 8-bit weights."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.exported import GRAPHS, load_exported
from minilm_exp.sentence_modules import Pooling
from minilm_exp.terms import embed

# Outputs, in this order, of whichever of them a model has.
_OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits")
# ONNX files have room for 2 GiB; above this weights lie beside them.
_ONE_FILE_BYTES = 1.8e9
# An export without quantisation that is further from its model, relative to the largest output,
# does not compute the same.
_ROUNDING = 1e-3


def export_model(
    graph: ExportGraph, tokenizer: PreTrainedTokenizerFast, name: str, folder: Path
) -> None:
    """Writes a model with its config and tokenizer; the folder appears only when all is written.

    The inputs are the tokenizer's, in any number and length; the outputs are the model's
    last_hidden_state or logits, and sentence_embedding where a pooling is given.

    onnx: by torch.onnx.export. onnx_int8: its matrix products with weights and its embeddings in 8
    bits by onnxruntime; activations are quantised as they come. torch_int8: linear layers likewise
    by torch, traced; embeddings stay as they are. Each output of a layer has a scale of its own:
    of sentence embeddings of all-MiniLM-L6-v2 the one that changes most then keeps a cosine of 0.98
    with itself (onnx_int8) and 0.93 (torch_int8), with one scale for all 0.91 and 0.88. Weights
    have all 8 bits, which needs a processor with VNNI, or of another kind than x86, to be exact.

    Args:
        graph: The model, on the CPU and in float32.
        tokenizer: Of the model.
        name: One of `settings.EXPORTS`.
        folder: Is replaced where it exists.

    Raises:
        ExperimentError: The architecture cannot be exported.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = graph.eval().model
    try:
        with _quiet():
            reference = _WRITERS[name](graph, partial / GRAPHS[name])
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if reference is not None:
            _check(reference, graph, partial)
    except Exception as error:  # exporters fail in as many ways as there are architectures
        raise ExperimentError(
            f"export={name}: a {model.config.model_type} ({type(model).__name__}) cannot be"
            f" exported: {reason_of(error)}; leave it out of export"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


class ExportGraph(nn.Module):
    """A model whose inputs have an order and whose outputs are tensors by name.

    Args:
        model: On the CPU.
        tokenizer: Of the model.
        pooling: Of sentence embeddings, which are then one of the outputs.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pooling: Pooling | None
    ) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        accepted = inspect.signature(model.forward).parameters
        self.has_types = (
            "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in accepted
        )
        self.inputs = ["input_ids", "attention_mask", *["token_type_ids"] * self.has_types]
        self.device = model.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        types = {"token_type_ids": token_type_ids} if self.has_types else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        found = {name: output[name] for name in _OUTPUTS if name in output}
        if self.pooling is not None:
            found["sentence_embedding"] = embed(
                output.last_hidden_state, attention_mask, self.pooling
            )
        return found

    def example(self, number: int, length: int) -> tuple[Tensor, ...]:
        """Sequences that the model can read, the second and later ones with padding."""
        low, high = self.model.config.vocab_size // 2, self.model.config.vocab_size
        draw = torch.Generator().manual_seed(0)
        input_ids = torch.randint(low, high, (number, length), generator=draw)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1:, length // 2 :] = 0
        token_type_ids = torch.zeros_like(input_ids)
        if getattr(self.model.config, "type_vocab_size", 0) > 1:
            token_type_ids[:, length // 3 :] = 1
        all_inputs = (input_ids, attention_mask, token_type_ids)
        return all_inputs[: len(self.inputs)]


def _write_onnx(graph: ExportGraph, file: Path) -> nn.Module:
    example = graph.example(2, 8)
    with torch.inference_mode():
        outputs = list(graph(*example))
    torch.onnx.export(
        graph,
        example,
        str(file),
        dynamo=True,
        input_names=graph.inputs,
        output_names=outputs,
        dynamic_shapes=tuple({0: "batch", 1: "sequence"} for _ in example),
        external_data=_is_large(graph),
        verbose=False,
    )
    return graph


def _write_onnx_int8(graph: ExportGraph, file: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole, prepared = file.with_name("float32.onnx"), file.with_name("prepared.onnx")
    _write_onnx(graph, whole)
    large = _is_large(graph)
    # Its inference of shapes by symbols does not know all that torch writes.
    quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True,
                      save_as_external_data=large)  # fmt: skip
    quantize_dynamic(str(prepared), str(file), per_channel=True, use_external_data_format=large)
    for used in (*file.parent.glob("float32.onnx*"), *file.parent.glob("prepared.onnx*")):
        used.unlink()


def _write_torch_int8(graph: ExportGraph, file: Path) -> nn.Module:
    # Its successor, torchao, has to be installed where the model is loaded.
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(
        graph, {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    )
    with torch.inference_mode():
        traced = torch.jit.trace(quantised, graph.example(2, 8), strict=False, check_trace=False)
    torch.jit.save(traced, str(file))
    return quantised


# What each gives computes the same as the file, if that was written well.
_WRITERS: dict[str, Callable[[ExportGraph, Path], nn.Module | None]] = {
    "onnx": _write_onnx,
    "onnx_int8": _write_onnx_int8,
    "torch_int8": _write_torch_int8,
}


@torch.inference_mode()
def _check(reference: nn.Module, graph: ExportGraph, folder: Path) -> None:
    """Refuses a file that computes something else at another number and length of sequences."""
    loaded = load_exported(folder, graph.model.config)
    example = graph.example(3, 13)
    expected, found = reference(*example), loaded(**dict(zip(graph.inputs, example)))
    is_real = example[1].bool()
    for name, value in expected.items():
        distances = (value - found[name]).abs()
        if value.shape[:2] == is_real.shape:
            value, distances = value[is_real], distances[is_real]
        largest, difference = float(value.abs().max()), float(distances.max())
        if not difference <= _ROUNDING * max(1.0, largest):
            raise ValueError(f"its {name} differs by {difference:.2g}")


def _is_large(graph: nn.Module) -> bool:
    return sum(one.numel() * one.element_size() for one in graph.parameters()) > _ONE_FILE_BYTES


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what exporters print, warn of and log below an error."""
    # Where the root logger has no handler, the first to log there would give it one for good.
    handler, disabled = logging.NullHandler(), logging.root.manager.disable
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.removeHandler(handler)
