"""What operators that move elements do to rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from forwardpass.model.onnx_file import Constant, OnnxNode
from forwardpass.model.row_sizes import MOST_ENTRIES, Given, Rule, integers_of, list_of
from forwardpass.model.row_values import Dependence, Dims, Entry, RowCount, Value, constant, count, rows, sizes, unknown


def _axis_of(x: Value, axis: int) -> int:
    return axis + (x.rank or 0) if axis < 0 else axis


def _shape(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x = given[0]
    if x is None or x.dims is None or x.kind in (Dependence.MIXED, Dependence.UNKNOWN):
        return unknown("")
    entries: list[Entry] = list(x.dims)
    if x.kind is Dependence.ROWS:
        entries[x.axis] = RowCount(x.outer * x.block)
    start, end = node.attributes.get("start", 0), node.attributes.get("end", len(entries))
    if not isinstance(start, int) or not isinstance(end, int):
        return unknown("")
    return sizes(entries[start:end])


def _reshape(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x, shape = given[0], given[1] if len(given) > 1 else None
    old = list_of(node, "shape")
    if shape is None and old is not None:
        shape = constant((len(old),), old)
    if x is None or shape is None:
        return unknown("")
    if x.kind is not Dependence.ROWS:
        if x.entries is not None:  # of a vector of sizes: the elements stay in their order
            wanted = shape.integers
            if wanted is None or 0 in wanted:
                return constant() if x.kind is Dependence.CONSTANT else unknown("")
            others = count([size for size in wanted if size != -1]) or 1
            return replace(x, dims=tuple(len(x.entries) // others if size == -1 else size for size in wanted))
        known = shape.integers
        return constant(None if known is None or any(v <= 0 for v in known) else known)
    if shape.entries is None or x.dims is None:
        return unknown("")
    target: list[Entry] = list(shape.entries)
    if not node.attributes.get("allowzero", 0):
        for place, size in enumerate(target):
            if size == 0 and place < len(x.dims):
                target[place] = RowCount(x.outer * x.block) if place == x.axis else x.dims[place]
    return _reshaped(x, target)


def _reshaped(x: Value, target: Sequence[Entry]) -> Value | str:
    """`x` with its elements in the same order under another shape, of which one size may be -1.

    In that order come: what lies before the rows' axis, and along it before all rows; the rows; the elements of each.
    """
    dims = x.dims or ()
    ahead = count(dims[: x.axis])
    if ahead is None:  # some size is not known: then they must stay as they are
        if list(dims[: x.axis]) != list(target[: x.axis]) or None in target[: x.axis]:
            return unknown("")
        place, outer = x.axis, x.outer
    else:
        found = _row_axis(ahead * x.outer, target)
        if isinstance(found, Value):
            return found
        place, outer = found
    each = count(dims[x.axis + 1 :])  # elements of one step along the rows' axis
    here = target[place] if place < len(target) else None
    rest = list(target[place + 1 :])
    if isinstance(here, RowCount) and each is None and here.times == x.outer * x.block and outer == x.outer:
        # The rows' axis stays as it is, and with it what belongs to each step of it.
        return replace(x, dims=(*_known(target[:place]), None, *_known(rest)), axis=place, entries=None)
    if each is None or any(isinstance(size, RowCount) for size in rest):
        return unknown("")
    total = x.block * each  # elements of a row, between those of the rows beside it
    if rest.count(-1) == 1 and isinstance(here, RowCount) and here.times % outer == 0:
        known = count([size if isinstance(size, int) else None for size in rest if size != -1])
        step = (here.times // outer) * known if known else 0
        if step and total % step == 0:
            rest[rest.index(-1)] = total // step
    per_step = count([size if isinstance(size, int) and size >= 0 else None for size in rest])
    if not per_step:
        return unknown("")
    if total % per_step:
        return unknown("puts elements of several rows side by side")
    block = total // per_step
    if isinstance(here, RowCount) and here.times != outer * block:
        return unknown("")
    return Value(Dependence.ROWS, (*_known(target[:place]), None, *_known(rest)), place, block, outer)


def _row_axis(ahead: int, target: Sequence[Entry]) -> tuple[int, int] | Value:
    """Which axis of `target` the rows come to lie along, and how often all of them come along it.

    `ahead`: elements, or steps, before the rows. Beyond the last axis: that is not known.
    """
    sofar = 1
    for place, size in enumerate(target):
        if not isinstance(size, int) or size < 0:
            return (place, ahead // sofar) if size is not None and ahead % sofar == 0 else (len(target), 1)
        if sofar == ahead and size > 1:
            return unknown("puts rows into a shape of fixed size")
        sofar *= size
        if sofar > ahead:
            return unknown("puts elements of several rows side by side")
        if not sofar:
            break
    return len(target), 1


def _known(entries: Sequence[Entry]) -> Dims:
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in entries)


def _flatten(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x = given[0]
    if x is None or x.dims is None:
        return unknown("")
    axis = node.attributes.get("axis", 1)
    axis = _axis_of(x, axis) if isinstance(axis, int) else 1
    if x.kind is not Dependence.ROWS:
        return constant((count(x.dims[:axis]), count(x.dims[axis:])))
    if x.axis != 0 or axis == 0:
        return unknown("puts elements of several rows side by side" if axis == 0 else "")
    inner = count(x.dims[1:axis])
    if inner is None:
        return unknown("")
    return replace(x, dims=(None, count(x.dims[axis:])), axis=0, block=x.block * inner, entries=None)


def _transpose(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x = given[0]
    if x is None or x.dims is None:
        return unknown("") if x is None or x.kind is Dependence.ROWS else constant()
    order = list_of(node, "perm") or tuple(range(len(x.dims)))[::-1]
    if sorted(order) != list(range(len(x.dims))):
        return unknown("")
    dims = tuple(x.dims[place] for place in order)
    return x.shaped(dims, order.index(x.axis)) if x.kind is Dependence.ROWS else constant(dims)


def _unsqueeze(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x, axes = given[0], integers_of(node, given, "axes", 1)
    if x is None or axes is None:
        return unknown("")
    if x.dims is None:
        return constant() if x.kind is Dependence.CONSTANT else unknown("")
    rank = len(x.dims) + len(axes)
    new = {axis + rank if axis < 0 else axis for axis in axes}
    old = iter(enumerate(x.dims))
    dims: list[int | None] = []
    row_axis = 0
    for place in range(rank):
        if place in new:
            dims.append(1)
            continue
        at, size = next(old)
        if at == x.axis:
            row_axis = place
        dims.append(size)
    return replace(x, dims=tuple(dims), axis=row_axis if x.kind is Dependence.ROWS else 0)


def _squeeze(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x, axes = given[0], integers_of(node, given, "axes", 1)
    if x is None:
        return unknown("")
    if x.dims is None:
        return constant() if x.kind is Dependence.CONSTANT else unknown("")
    if axes is None:
        if (len(given) > 1 and given[1] is not None) or None in x.dims:
            return unknown("")  # the rows' own axis would go with a batch of one
        axes = tuple(place for place, size in enumerate(x.dims) if size == 1)
    gone = {_axis_of(x, axis) for axis in axes}
    if x.kind is Dependence.ROWS and x.axis in gone:
        return unknown("takes the rows' axis away")
    kept = [place for place in range(len(x.dims)) if place not in gone]
    dims = tuple(x.dims[place] for place in kept)
    return replace(x, dims=dims, axis=kept.index(x.axis) if x.kind is Dependence.ROWS else 0)


def _slice(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x = given[0]
    starts, ends = integers_of(node, given, "starts", 1), integers_of(node, given, "ends", 2)
    axes, steps = integers_of(node, given, "axes", 3), integers_of(node, given, "steps", 4)
    if x is None or x.dims is None:
        return unknown("") if x is None or x.kind is not Dependence.CONSTANT else constant()
    absent = [len(given) <= place or given[place] is None for place in (3, 4)]
    if axes is None and absent[0] and starts is not None:
        axes = tuple(range(len(starts)))
    if axes is None:
        return unknown("") if x.kind is not Dependence.CONSTANT else constant()
    if x.kind is Dependence.ROWS and x.axis in {_axis_of(x, axis) for axis in axes}:
        place = [_axis_of(x, axis) for axis in axes].index(x.axis)
        whole = starts is not None and ends is not None and starts[place] == 0 and ends[place] >= (1 << 31) - 1
        step = (steps or ())[place : place + 1]
        if not whole or (not absent[1] and step != (1,)):
            return unknown("takes some of the rows by their places")
    if x.entries is not None and len(x.dims) == 1 and starts is not None and ends is not None:
        step_of = 1 if absent[1] else (steps or (0,))[0]
        return sizes(x.entries[starts[0] : ends[0] : step_of]) if step_of else unknown("")
    cut = {_axis_of(x, axis) for axis in axes}
    keep = x.axis if x.kind is Dependence.ROWS else -1
    return x.shaped(tuple(None if place in cut and place != keep else size for place, size in enumerate(x.dims)))


def _split(node: OnnxNode, given: Given, _opset: int) -> list[Value] | Value | str:
    x = given[0]
    axis = node.attributes.get("axis", 0)
    if x is None or x.dims is None or not isinstance(axis, int):
        return unknown("") if x is None or x.kind is not Dependence.CONSTANT else constant()
    place = _axis_of(x, axis)
    if x.kind is Dependence.ROWS and place == x.axis:
        return unknown("divides the rows by their places")
    parts = integers_of(node, given, "split", 1)
    if x.entries is not None and len(x.dims) == 1 and parts is not None:
        starts = [sum(parts[:i]) for i in range(len(parts))]
        return [sizes(x.entries[start : start + size]) for start, size in zip(starts, parts, strict=True)]
    whole = x.dims[place]
    if parts is None and whole is not None and node.outputs and whole % len(node.outputs) == 0:
        parts = (whole // len(node.outputs),) * len(node.outputs)
    return [
        x.shaped((*x.dims[:place], None if parts is None else parts[i], *x.dims[place + 1 :]))
        for i in range(len(node.outputs))
    ]


def _concat(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    values = [value for value in given if value is not None]
    axis = node.attributes.get("axis", 1)
    of_rows = [value for value in values if value.kind is Dependence.ROWS]
    if not of_rows:
        if all(value.entries is not None and len(value.dims or ()) == 1 for value in values):
            return sizes([entry for value in values for entry in value.entries or ()][:MOST_ENTRIES])
        return (
            constant()
            if all(v.kind is Dependence.CONSTANT for v in values)
            else unknown("computes with the number of rows")
        )
    first = of_rows[0]
    if first.dims is None or not isinstance(axis, int):
        return unknown("")
    place = _axis_of(first, axis)
    if len(of_rows) != len(values):
        return unknown("")  # a constant beside rows has as many of them as were foreseen
    if any((v.axis, v.layout, v.rank) != (first.axis, first.layout, first.rank) for v in of_rows):
        return "combines rows with rows"
    if place == first.axis:
        return unknown("puts rows behind rows")
    along = [(v.dims or ())[place] for v in of_rows]
    total = None if None in along else sum(size for size in along if size is not None)
    return first.shaped((*first.dims[:place], total, *first.dims[place + 1 :]))


def _gather(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    data, indices = given[0], given[1]
    axis = node.attributes.get("axis", 0)
    if data is None or indices is None or not isinstance(axis, int):
        return unknown("")
    if data.entries is not None and len(data.dims or ()) == 1 and indices.integers is not None:
        chosen = [data.entries[i] for i in indices.integers if -len(data.entries) <= i < len(data.entries)]
        return sizes(chosen, indices.dims if indices.dims is not None else (len(chosen),))
    if data.kind is Dependence.SIZES or indices.kind is Dependence.SIZES:
        return unknown("computes with the number of rows")
    if data.kind is Dependence.CONSTANT and indices.kind is Dependence.CONSTANT:
        return constant()
    if data.dims is None or indices.dims is None:
        return unknown("")
    place = _axis_of(data, axis)
    dims = (*data.dims[:place], *indices.dims, *data.dims[place + 1 :])
    if data.kind is Dependence.CONSTANT:
        return indices.shaped(dims, place + indices.axis)
    if indices.kind is Dependence.ROWS:
        return unknown("looks rows up by rows")
    if place == data.axis:
        return unknown("takes some of the rows by their places")
    return data.shaped(dims, data.axis if data.axis < place else data.axis + len(indices.dims) - 1)


def _gather_elements(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    """GatherElements, and ScatterElements with what it writes: along one axis, place by place along the others."""
    values = [value for value in given if value is not None]
    of_rows = [value for value in values if value.kind is Dependence.ROWS]
    axis = node.attributes.get("axis", 0)
    if not of_rows:
        return constant()
    first = of_rows[0]
    if len(of_rows) != len(values) or first.rank is None or not isinstance(axis, int):
        return unknown("")
    if any((v.axis, v.layout, v.rank) != (first.axis, first.layout, first.rank) for v in of_rows):
        return "combines rows with rows"
    if _axis_of(first, axis) == first.axis:
        return unknown("looks rows up by rows")
    return first.shaped((None,) * first.rank)


def _expand(_node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x, shape = given[0], given[1]
    if x is None or shape is None or x.dims is None or shape.entries is None:
        return unknown("")
    target, rank = list(shape.entries), max(len(x.dims), len(shape.entries))
    entries: list[Entry] = [None] * len(x.dims)
    for place, size in enumerate(x.dims):
        entries[place] = RowCount(x.outer * x.block) if x.kind is Dependence.ROWS and place == x.axis else size
    ones: list[Entry] = [1] * rank
    asked, there = ones[len(target) :] + target, ones[len(entries) :] + entries
    joined = [_wider(a, b) for a, b in zip(asked, there, strict=True)]
    at = [place for place, entry in enumerate(joined) if isinstance(entry, RowCount)]
    if not at:
        return (
            unknown("")
            if x.kind is Dependence.ROWS
            else constant(tuple(e if isinstance(e, int) else None for e in joined))
        )
    if len(at) > 1 or (x.kind is Dependence.ROWS and at[0] != x.axis + rank - len(x.dims)):
        return unknown("spreads rows over rows")
    found = joined[at[0]]
    assert isinstance(found, RowCount)
    if x.kind is not Dependence.ROWS:
        return rows(_known(joined), at[0], found.times)
    return x.shaped(_known(joined), at[0]) if found.times == x.outer * x.block else unknown("")


def _wider(a: Entry, b: Entry) -> Entry:
    """The size that two sizes broadcast to."""
    if a == 1:
        return b
    return a if b == 1 or b is None or a == b else None


def _tile(_node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x, repeats = given[0], given[1].integers if given[1] is not None else None
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    if repeats is None or x.dims is None or len(repeats) != len(x.dims):
        return unknown("")
    if repeats[x.axis] != 1:
        return unknown("repeats the rows")
    return x.shaped(tuple(None if s is None else s * r for s, r in zip(x.dims, repeats, strict=True)))


def _pad(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x, pads = given[0], integers_of(node, given, "pads", 1)
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    if pads is None or x.rank is None or len(pads) != 2 * x.rank or (len(given) > 3 and given[3] is not None):
        return unknown("")
    if pads[x.axis] or pads[x.axis + x.rank]:
        return unknown("pads the rows' axis")
    return x.shaped(tuple(None if s is None else s + pads[i] + pads[i + x.rank] for i, s in enumerate(x.dims or ())))


def _constant_of_shape(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    shape = given[0]
    if shape is None or shape.entries is None:
        return unknown("")
    at = [place for place, entry in enumerate(shape.entries) if isinstance(entry, RowCount)]
    dims = tuple(entry if isinstance(entry, int) else None for entry in shape.entries)
    if not at:
        value = node.attributes.get("value")
        one = value.values[0] if isinstance(value, Constant) and value.values else None
        size = count(dims)
        filled = None if one is None or size is None or size > MOST_ENTRIES else [one] * size
        return constant(dims, filled)
    entry = shape.entries[at[0]]
    if len(at) > 1 or not isinstance(entry, RowCount):
        return unknown("makes a table of rows by rows")
    return rows(dims, at[0], entry.times)


def _range(_node: OnnxNode, given: Given, _opset: int) -> Value | str:
    counted = any(value is not None and value.kind is not Dependence.CONSTANT for value in given)
    return unknown("numbers the rows by their places") if counted else constant((None,))


def _trilu(_node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x = given[0]
    if x is None or x.kind is not Dependence.ROWS:
        return constant(None if x is None else x.dims)
    if x.rank is None or (len(given) > 1 and given[1] is not None and given[1].kind is not Dependence.CONSTANT):
        return unknown("")
    return x if x.axis < x.rank - 2 else unknown("depends on a row's place")


SHAPE_RULES: dict[str, Rule] = {
    "Shape": _shape, "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose, "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze, "Slice": _slice, "Split": _split, "Concat": _concat, "Gather": _gather,
    "GatherElements": _gather_elements, "ScatterElements": _gather_elements, "Expand": _expand, "Tile": _tile,
    "Pad": _pad, "ConstantOfShape": _constant_of_shape, "Range": _range, "Trilu": _trilu,
}  # fmt: skip
