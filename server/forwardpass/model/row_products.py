"""What products do to rows: matrices, sums over named axes, attention, recurrent layers. Pure."""

from __future__ import annotations

import re

from forwardpass.model.onnx_file import OnnxNode
from forwardpass.model.row_sizes import Given, Rule, number, of_rows_in
from forwardpass.model.row_values import Dependence, Value, broadcast, constant, unknown


def _gemm(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    a, b, c = given[0], given[1], given[2] if len(given) > 2 else None
    if a is None or b is None:
        return unknown("")
    if not of_rows_in(given):
        return constant()
    if b.kind is Dependence.ROWS and a.kind is Dependence.ROWS:
        return "multiplies rows with rows"
    if a.kind is not Dependence.ROWS:
        return unknown("")
    row_axis = 1 if number(node, "transA", 0) else 0
    if a.axis != row_axis:
        return "sums over rows"
    width = None if b.dims is None or len(b.dims) != 2 else b.dims[0 if number(node, "transB", 0) else 1]
    out = a.shaped((None, width), 0)
    if c is None or (c.kind is Dependence.CONSTANT and c.rank is not None and c.rank < 2):
        return out
    return broadcast([out, c])


def _matmul(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    places = (0, 3) if node.op == "QLinearMatMul" else (0, 1)
    extra = [v for i, v in enumerate(given) if i not in places and v is not None]
    if any(value.kind is not Dependence.CONSTANT for value in extra):
        return unknown("")
    if node.op == "FusedMatMul" and any(number(node, n, 0) for n in ("transA", "transB", "transBatchA", "transBatchB")):
        return unknown("")
    a, b = given[places[0]], given[places[1]]
    if a is None or b is None:
        return unknown("")
    if not of_rows_in([a, b]):
        return constant()
    if a.rank is None or b.rank is None:
        return unknown("")
    rank = max(a.rank, b.rank, 2)
    if a.rank < 2 or (b.rank < 2 and b.kind is Dependence.ROWS):
        return unknown("")
    width = (b.dims or ())[-1] if b.rank >= 2 else None
    if a.kind is Dependence.ROWS and b.kind is Dependence.ROWS:
        behind = a.rank - a.axis
        if behind != b.rank - b.axis or behind <= 2:
            return "multiplies rows with rows"
        if a.layout != b.layout:
            return unknown("")
    elif a.kind is Dependence.ROWS:
        if a.axis == a.rank - 1:
            return "sums over rows"
        behind = a.rank - a.axis
        if behind > 2 and b.rank >= behind and (b.dims or ())[b.rank - behind] != 1:
            return unknown("multiplies rows by their places with a constant")
        if b.rank < 2:
            return a.shaped((a.dims or ())[:-1])
    else:
        if b.axis == b.rank - 2:
            return "sums over rows"
        behind = b.rank - b.axis
        if behind > 2 and a.rank >= behind and (a.dims or ())[a.rank - behind] != 1:
            return unknown("multiplies rows by their places with a constant")
    source = a if a.kind is Dependence.ROWS else b
    dims: list[int | None] = [*([None] * (rank - 2)), (a.dims or ())[-2], width]
    for place in range(rank - 2):
        sizes = [d[place - rank + len(d)] for d in (a.dims or (), b.dims or ()) if place - rank + len(d) >= 0]
        dims[place] = next((s for s in sizes if s is not None and s != 1), sizes[0] if len(sizes) == 1 else None)
    return source.shaped(tuple(dims), rank - behind)


def _recurrent(node: OnnxNode, given: Given, _opset: int) -> list[Value] | str:
    """LSTM, GRU, RNN: [steps, batch, size], or [batch, steps, size] with layout 1."""
    x = given[0]
    if x is None or x.kind is not Dependence.ROWS:
        return [constant()]
    batch = 0 if number(node, "layout", 0) else 1
    if any(v is not None and v.kind is not Dependence.CONSTANT for v in given[1:4]):
        return [unknown("")]
    for place, value in enumerate(given[4:7], 4):
        axis = 0 if place == 4 or batch == 0 else 1
        if value is not None and value.kind is Dependence.ROWS and (value.axis, value.layout) != (axis, x.layout):
            return "takes rows along another axis"
        if value is not None and value.kind is Dependence.SIZES:
            return [unknown("")]
    if x.rank != 3:
        return [unknown("")]
    if x.axis != batch:
        return f"steps along axis {x.axis}, along which the rows lie"
    y = x.shaped((None, None, None, None), 0 if batch == 0 else 2)
    return [y, x.shaped((None, None, None), 0 if batch == 0 else 1)]


def _einsum(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    text = node.attributes.get("equation", b"")
    equation = text.decode("ascii", "replace").replace(" ", "") if isinstance(text, bytes) else ""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(given) or not re.fullmatch(r"[A-Za-z,]*", left):
        return unknown("")
    letters = {
        term[value.axis]
        for term, value in zip(terms, given, strict=True)
        if value is not None and value.kind is Dependence.ROWS and value.axis < len(term)
    }
    if not letters:
        return constant()
    if len(letters) > 1:
        return "combines rows with rows"
    (letter,) = letters
    if letter not in right or right.count(letter) > 1:
        return "sums over rows"
    for term, value in zip(terms, given, strict=True):
        if value is None or value.kind is Dependence.SIZES or (value.kind is Dependence.CONSTANT and letter in term):
            return unknown("")
        if value.kind is Dependence.ROWS and term.count(letter) > 1:
            return "combines rows with rows"
    of_rows = of_rows_in(given)
    if len({value.layout for value in of_rows}) > 1:
        return unknown("")
    return of_rows[0].shaped((None,) * len(right), right.index(letter))


def _attention(_node: OnnxNode, given: Given, _opset: int) -> Value | str:
    """Query, key and value with rows along axis 0; a mask without them."""
    of_rows = of_rows_in(given[:3])
    others = [v for v in given[3:] if v is not None and v.kind is not Dependence.CONSTANT]
    if len(of_rows) != 3 or others or any(not v.plain or v.rank not in (3, 4) for v in of_rows):
        return unknown("")
    return of_rows[0].shaped((None,) * (of_rows[0].rank or 0))


PRODUCT_RULES: dict[str, Rule] = {
    "Gemm": _gemm,
    **dict.fromkeys(("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul"), _matmul),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "Einsum": _einsum,
    "Attention": _attention,
}
