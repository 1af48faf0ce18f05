"""The forward pass by its equations, in NumPy and float64: the expected value of every tensor, without a runtime.

One function per operator, as defined by ONNX, for the operators of feedforward networks. A node of any other operator
is not computed: its outputs are taken from the runtime, and the node is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import InsightError
from forwardpass.model.onnx_graph import Graph, GraphNode

Array = NDArray[Any]
Equation = Callable[..., Array]  # (attributes, *inputs); an omitted input is None


def _erf(z: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(z))


def evaluate(
    graph: Graph, feeds: Mapping[str, Array], served: Mapping[str, Array]
) -> tuple[dict[str, Array], list[str]]:
    """Every tensor for the rows in `feeds`, floats in float64, and the names of nodes taken from the runtime instead.

    `served`: a runtime's outputs by tensor, for nodes without an equation here. Raises InsightError if one is missing,
    or if an equation does not fit its inputs.
    """
    values: dict[str, Array] = {name: _wide(array) for name, array in {**graph.constants, **feeds}.items()}
    taken = []
    for node in graph.nodes:
        equation = EQUATIONS.get(node.op) if node.domain in ("", "ai.onnx") else None
        if equation is None or len([name for name in node.outputs if name]) != 1:
            if any(name and name not in served for name in node.outputs):
                raise InsightError(f"node {node.name}: there is no equation for {node.op} here")
            values.update({name: _wide(served[name]) for name in node.outputs if name})
            taken.append(node.name)
            continue
        given = [values[name] if name else None for name in node.inputs]
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                values[node.outputs[0]] = equation(node.attributes, *given)
        except (ValueError, IndexError, TypeError) as error:
            raise InsightError(f"node {node.name} ({node.op}): the equation does not fit: {error}") from None
    return values, taken


def has_equation(node: GraphNode) -> bool:
    return node.op in EQUATIONS and node.domain in ("", "ai.onnx")


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _gemm(attributes: Mapping[str, Any], a: Array, b: Array, c: Array | None = None) -> Array:
    """z = alpha A B + beta C: with transB, X Wᵀ + b."""
    product = (a.T if attributes.get("transA") else a) @ (b.T if attributes.get("transB") else b)
    z: Array = attributes.get("alpha", 1.0) * product
    return z if c is None else z + attributes.get("beta", 1.0) * c


def _softmax(attributes: Mapping[str, Any], z: Array) -> Array:
    axis = attributes.get("axis", -1)
    powers = np.exp(z - z.max(axis=axis, keepdims=True))  # minus the maximum: the same quotient, no overflow
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def _gelu(attributes: Mapping[str, Any], z: Array) -> Array:
    if attributes.get("approximate", b"none") == b"tanh":
        return np.asarray(0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))))
    return np.asarray(0.5 * z * (1 + _erf(z / math.sqrt(2))))


def _elu(z: Array, alpha: float, scale: float = 1.0) -> Array:
    return np.asarray(scale * np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0))))


def _clip(_attributes: Mapping[str, Any], z: Array, low: Array | None = None, high: Array | None = None) -> Array:
    return np.asarray(np.clip(z, -np.inf if low is None else low, np.inf if high is None else high))


def _batch_norm(
    attributes: Mapping[str, Any], z: Array, scale: Array, bias: Array, mean: Array, variance: Array
) -> Array:
    places = [1, -1] + [1] * (z.ndim - 2)
    deviation = np.sqrt(variance + attributes.get("epsilon", 1e-5)).reshape(places)
    return np.asarray((z - mean.reshape(places)) / deviation * scale.reshape(places) + bias.reshape(places))


def _layer_norm(attributes: Mapping[str, Any], z: Array, scale: Array, bias: Array | None = None) -> Array:
    axes = tuple(range(attributes.get("axis", -1) % z.ndim, z.ndim))
    centred = z - z.mean(axis=axes, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + attributes.get("epsilon", 1e-5)) * scale
    return np.asarray(normal if bias is None else normal + bias)


def _reshape(attributes: Mapping[str, Any], z: Array, shape: Array) -> Array:
    keep = not attributes.get("allowzero")
    return z.reshape([z.shape[i] if size == 0 and keep else int(size) for i, size in enumerate(shape)])


def _flatten(attributes: Mapping[str, Any], z: Array) -> Array:
    return z.reshape(math.prod(z.shape[: attributes.get("axis", 1)]), -1)


# By operator: attributes first, then the inputs. σ is the logistic function.
EQUATIONS: dict[str, Equation] = {
    "Gemm": _gemm,
    "MatMul": lambda _, a, b: a @ b,
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a / b,
    "Pow": lambda _, a, b: a**b,
    "Neg": lambda _, z: -z,
    "Abs": lambda _, z: np.abs(z),
    "Exp": lambda _, z: np.exp(z),
    "Log": lambda _, z: np.log(z),
    "Sqrt": lambda _, z: np.sqrt(z),
    "Erf": lambda _, z: _erf(z),
    "Clip": _clip,
    "Relu": lambda _, z: np.maximum(z, 0),
    "LeakyRelu": lambda k, z: np.where(z < 0, k.get("alpha", 0.01) * z, z),
    "PRelu": lambda _, z, slope: np.where(z < 0, slope * z, z),
    "Elu": lambda k, z: _elu(z, k.get("alpha", 1.0)),
    "Selu": lambda k, z: _elu(z, k.get("alpha", 1.6732632423543772), k.get("gamma", 1.0507009873554805)),
    "Sigmoid": lambda _, z: 1 / (1 + np.exp(-z)),
    "HardSigmoid": lambda k, z: np.clip(k.get("alpha", 0.2) * z + k.get("beta", 0.5), 0, 1),
    "HardSwish": lambda _, z: z * np.clip(z / 6 + 0.5, 0, 1),
    "Swish": lambda k, z: z / (1 + np.exp(-k.get("alpha", 1.0) * z)),
    "Mish": lambda _, z: z * np.tanh(np.logaddexp(0, z)),
    "Tanh": lambda _, z: np.tanh(z),
    "Softplus": lambda _, z: np.logaddexp(0, z),
    "Softsign": lambda _, z: z / (1 + np.abs(z)),
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LogSoftmax": lambda k, z: np.log(_softmax(k, z)),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Identity": lambda _, z: z,
    "Dropout": lambda _, z, *_rest: z,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": lambda k, z: np.transpose(z, k.get("perm")),
    "Concat": lambda k, *parts: np.concatenate(parts, axis=k["axis"]),
    "Gather": lambda k, table, places: np.take(table, places, axis=k.get("axis", 0)),
    "Squeeze": lambda _, z, axes=None: np.squeeze(z, None if axes is None else tuple(axes)),
    "Unsqueeze": lambda _, z, axes: np.expand_dims(z, tuple(axes)),
}
