"""A network from its ONNX file as a forward pass in PyTorch, with its weights as trainable parameters.

Supports the operators of plain feedforward networks. A tensor is released after its last use, so that only what
autograd keeps for the backward pass stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from forwardpass.errors import InsightError
from forwardpass.model.onnx_graph import Graph

Operator = Callable[..., torch.Tensor]


class TorchForward:
    """A callable that takes tensors [B, ...] by input name and returns the first output."""

    def __init__(self, graph: Graph) -> None:
        """Raises InsightError with the names of unsupported operators."""
        unknown = sorted({node.op for node in graph.nodes if node.op not in _OPERATORS or node.domain not in _DOMAINS})
        if unknown:
            raise InsightError(f"cannot run {', '.join(unknown)} in PyTorch; known are {', '.join(_OPERATORS)}")
        weighed = {name for node in graph.nodes if node.layer for name in node.inputs if name in graph.constants}
        self._constants = {name: torch.from_numpy(np.array(array)) for name, array in graph.constants.items()}
        for name, tensor in self._constants.items():
            tensor.requires_grad_(tensor.is_floating_point() and name in weighed)
        self._nodes = graph.nodes
        self._output = graph.outputs[0]
        self._last_use: list[list[str]] = [[] for _ in graph.nodes]
        seen = {self._output, *self._constants}
        for place in reversed(range(len(graph.nodes))):
            for name in (*graph.nodes[place].inputs, *graph.nodes[place].outputs):
                if name and name not in seen:
                    seen.add(name)
                    self._last_use[place].append(name)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [tensor for tensor in self._constants.values() if tensor.requires_grad]

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = dict(feeds)
        for node, over in zip(self._nodes, self._last_use, strict=True):
            given = [values[name] if name in values else self._constants.get(name) for name in node.inputs]
            values[node.outputs[0]] = _OPERATORS[node.op](node.attributes, *given)
            del given
            for name in over:
                values.pop(name, None)
        return values[self._output]


def saved_bytes(forward: TorchForward, feeds: Mapping[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps from one forward pass for the backward pass, by PyTorch's own count.

    Excludes the weights and the inputs, which exist anyway; storage kept twice is counted once.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in (*forward.parameters, *feeds.values())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = forward(feeds)
    nbytes = sum(storage.nbytes() for storage in kept.values())
    del answer
    return nbytes


def _gemm(k: Mapping[str, Any], a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    plain = k.get("alpha", 1.0) == 1.0 and k.get("beta", 1.0) == 1.0 and not k.get("transA")
    if plain and k.get("transB") and (c is None or c.ndim == 1):
        return functional.linear(a, b, c)
    product: torch.Tensor = k.get("alpha", 1.0) * ((a.T if k.get("transA") else a) @ (b.T if k.get("transB") else b))
    return product if c is None else product + k.get("beta", 1.0) * c


_DOMAINS = ("", "ai.onnx")
_OPERATORS: dict[str, Operator] = {
    "Gemm": _gemm,
    "MatMul": lambda _, a, b: a @ b,
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a / b,
    "Relu": lambda _, z: torch.relu(z),
    "LeakyRelu": lambda k, z: functional.leaky_relu(z, k.get("alpha", 0.01)),
    "Elu": lambda k, z: functional.elu(z, k.get("alpha", 1.0)),
    "Sigmoid": lambda _, z: torch.sigmoid(z),
    "Tanh": lambda _, z: torch.tanh(z),
    "Softplus": lambda _, z: functional.softplus(z),
    "Gelu": lambda k, z: functional.gelu(z, approximate=k.get("approximate", b"none").decode()),
    "Softmax": lambda k, z: torch.softmax(z, k.get("axis", -1)),
    "LogSoftmax": lambda k, z: torch.log_softmax(z, k.get("axis", -1)),
    "LayerNormalization": lambda k, z, scale, bias=None: functional.layer_norm(
        z, list(scale.shape), scale, bias, k.get("epsilon", 1e-5)
    ),
    "BatchNormalization": lambda k, z, scale, bias, mean, variance: functional.batch_norm(
        z, mean.detach(), variance.detach(), scale, bias, eps=k.get("epsilon", 1e-5)
    ),
    "Concat": lambda k, *parts: torch.cat(parts, k["axis"]),
    "Gather": lambda _, table, places: functional.embedding(places, table),
    "Flatten": lambda k, z: torch.flatten(z, k.get("axis", 1)),
    "Identity": lambda _, z: z,
    "Dropout": lambda _, z, *_rest: z,
}
