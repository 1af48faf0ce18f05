"""The arithmetic of shapes: what nodes compute of a tensor's sizes, for operators whose shape is an input. Pure."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from forwardpass.model.onnx_file import OnnxNode
from forwardpass.model.row_values import Dependence, Entry, RowCount, Value, constant, sizes, unknown

Given = Sequence[Value | None]
Rule = Callable[[OnnxNode, Given, int], "list[Value] | Value | str"]
MOST_ENTRIES = 4096

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.floordiv, "Mod": operator.mod,
    "Max": max, "Min": min, "Equal": lambda a, b: int(a == b), "Greater": lambda a, b: int(a > b),
    "Less": lambda a, b: int(a < b),
}  # fmt: skip
_WHOLE = (6, 7)  # TensorProto.DataType: INT32, INT64
_LARGEST = 1 << 31
_SAME = frozenset({"Identity", "Cast", "CastLike"})


def number(node: OnnxNode, name: str, default: int) -> int:
    """An integer attribute."""
    value = node.attributes.get(name, default)
    return value if isinstance(value, int) else default


def list_of(node: OnnxNode, name: str) -> tuple[int, ...] | None:
    """An attribute that is a list of integers; None: absent."""
    value = node.attributes.get(name)
    return tuple(int(v) for v in value if isinstance(v, int | float)) if isinstance(value, tuple) else None


def of_rows_in(given: Given) -> list[Value]:
    """Those of a node's inputs that have rows."""
    return [value for value in given if value is not None and value.kind is Dependence.ROWS]


def integers_of(node: OnnxNode, given: Given, name: str, place: int) -> tuple[int, ...] | None:
    """A list that is an attribute in older operators and an input in newer ones; None: absent, or not known."""
    attribute = list_of(node, name)
    if attribute is not None:
        return attribute
    if isinstance(single := node.attributes.get(name), int):
        return (single,)
    tensor = given[place] if len(given) > place else None
    return None if tensor is None else tensor.integers


def arithmetic(node: OnnxNode, given: Given) -> Value:
    """An elementwise operator on vectors of sizes; unknown where what it gives is no shape any more."""
    values = [value for value in given if value is not None]
    of_sizes = any(value.kind is Dependence.SIZES for value in values)
    beyond = unknown("computes with the number of rows") if of_sizes else constant()
    # Beyond vectors and whole numbers, as in tables and in floats, elements are not followed.
    if any(value.dims is None or len(value.dims) > 1 for value in values) or number(node, "fmod", 0):
        return beyond
    if node.op in ("Cast", "CastLike") and node.attributes.get("to") not in _WHOLE:
        return beyond
    lists = [value.entries for value in values]
    if any(entries is None for entries in lists) or any(value.kind is Dependence.ROWS for value in values):
        return beyond
    length = max(len(entries or ()) for entries in lists)
    dims = max((value.dims or () for value in values), key=len)
    spread = [list(entries or ()) * (length if len(entries or ()) == 1 else 1) for entries in lists]
    if any(len(entries) != length for entries in spread):
        return beyond
    if node.op in _SAME:
        return sizes(spread[0], dims)
    function = _ARITHMETIC.get(node.op)
    if node.op == "Where" and len(spread) == 3:
        found = [_chosen(c, a, b) for c, a, b in zip(*spread, strict=True)]
    elif function is not None and len(spread) == 2:
        found = [_computed(node.op, function, a, b) for a, b in zip(*spread, strict=True)]
    else:
        return beyond
    # What is not known of sizes may depend on how many rows there are.
    return beyond if of_sizes and None in found else sizes(found, dims)


def _chosen(condition: Entry, a: Entry, b: Entry) -> Entry:
    return (a if condition else b) if isinstance(condition, int) else a if a == b else None


def _computed(op: str, function: Callable[[int, int], int], a: Entry, b: Entry) -> Entry:
    if isinstance(a, int) and isinstance(b, int):
        if op in ("Div", "Mod") and not b:
            return None
        found = math.trunc(a / b) if op == "Div" and (a < 0) != (b < 0) else function(a, b)
        return found if -_LARGEST <= found < _LARGEST else None  # else it may wrap around
    if op == "Mul" and isinstance(a, RowCount) and isinstance(b, int):
        return RowCount(a.times * b) if b > 0 else None
    if op == "Mul" and isinstance(a, int) and isinstance(b, RowCount):
        return RowCount(a * b.times) if a > 0 else None
    if op == "Div" and isinstance(a, RowCount) and isinstance(b, int) and b > 0 and a.times % b == 0:
        return RowCount(a.times // b)
    if op == "Div" and isinstance(a, RowCount) and isinstance(b, RowCount) and a.times % b.times == 0:
        return a.times // b.times
    if op == "Equal" and isinstance(a, RowCount) != isinstance(b, RowCount) and -1 in (a, b):
        return 0  # as torch's Expand asks of each size whether it is -1
    return None
