"""An export as it is used: loaded from its folder and called like the model it was made of."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

# The file that holds the model, by the name of the export.
GRAPHS = {"onnx": "model.onnx", "onnx_int8": "model.onnx", "torch_int8": "model.pt"}


def load_exported(folder: Path, config: PreTrainedConfig) -> Exported:
    """The model of an export's folder, on the CPU with as many threads as torch has."""
    if (folder / "model.pt").is_file():
        return _Traced(folder / "model.pt", config)
    return load_session(folder / "model.onnx", config)


def load_session(file: Path, config: PreTrainedConfig) -> Exported:
    """An ONNX file, by onnxruntime."""
    return _Session(file, config)


class Exported(nn.Module):
    """Takes input_ids, attention_mask and token_type_ids by name; outputs have their names too.

    Args:
        config: Of the model that was exported.
    """

    device = torch.device("cpu")

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self._inputs: list[str] = []

    def forward(self, **inputs: Tensor) -> ModelOutput:
        """The outputs; token types that are not given are 0."""
        types = torch.zeros_like(inputs["input_ids"])
        given = {"token_type_ids": types} | inputs
        output = ModelOutput()
        for name, value in self._compute({name: given[name] for name in self._inputs}).items():
            output[name] = value
        return output

    def _compute(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class _Session(Exported):
    """By onnxruntime."""

    def __init__(self, file: Path, config: PreTrainedConfig) -> None:
        from onnxruntime import InferenceSession, SessionOptions

        super().__init__(config)
        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        # Threads that wait busily would take the time of the model that is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]

    def _compute(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = self._session.run(None, {name: one.numpy() for name, one in inputs.items()})
        return {
            name: torch.from_numpy(numpy.asarray(value))
            for name, value in zip(self._outputs, values)
        }


class _Traced(Exported):
    """By torch."""

    def __init__(self, file: Path, config: PreTrainedConfig) -> None:
        super().__init__(config)
        with warnings.catch_warnings():  # that torch.jit will be replaced
            warnings.simplefilter("ignore")
            self._traced = torch.jit.load(str(file), map_location="cpu").eval()
        schema = self._traced.forward.schema
        self._inputs = [one.name for one in schema.arguments if one.name != "self"]

    def _compute(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._traced(**inputs)
        return found
