"""What each operator does to rows: from what is known of a node's inputs to what is known of its outputs. Pure.

A rule may only claim ROWS where every element of a row of the output is computed from that row of the inputs, whatever
the values are. What no rule covers is unknown. Operators: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from forwardpass.model.onnx_file import Constant, OnnxGraph, OnnxNode
from forwardpass.model.row_products import PRODUCT_RULES
from forwardpass.model.row_shapes import SHAPE_RULES
from forwardpass.model.row_sizes import Given, Rule, arithmetic, integers_of, list_of, number, of_rows_in
from forwardpass.model.row_values import Dependence, RowCount, Value, broadcast, constant, mixed, rows, unknown, worst


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
    CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
    Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu
    Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
    QuantizeLinear DequantizeLinear BiasGelu FastGelu QuickGelu Affine ParametricSoftplus ScaledTanh
    """
)
# Each row of the first input by itself, along axis 0, given that the others are constants.
ALONG_AXIS_0 = _names(
    """
    Conv ConvTranspose MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool LRN BatchNormalization
    InstanceNormalization GroupNormalization DepthToSpace SpaceToDepth ConvInteger QLinearConv Col2Im Upsample Resize
    FusedConv QLinearAveragePool QLinearGlobalAveragePool DeformConv
    """
)
# Of ai.onnx.ml: tables of rows.
TABLES = _names(
    """
    ArrayFeatureExtractor Binarizer Imputer LabelEncoder LinearClassifier LinearRegressor Normalizer OneHotEncoder
    SVMClassifier SVMRegressor Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor ZipMap
    CategoryMapper FeatureVectorizer
    """
)
MIXING = {
    "NonZero": "lists the places of all rows together",
    "Compress": "chooses among all rows together",
    "Unique": "compares all rows",
    "NonMaxSuppression": "compares all rows",
    "DynamicQuantizeLinear": "scales by the largest value of all rows",
    "StringSplit": "pads every row to the longest",
    "RandomNormalLike": "is random",
    "RandomUniformLike": "is random",
    "Bernoulli": "is random",
    "Multinomial": "is random",
}
REDUCTIONS = _names(
    """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    ArgMax ArgMin
    """
)
# Of com.microsoft, what ONNX Runtime's own tools write into files.
MICROSOFT = _names("BiasGelu FastGelu QuickGelu FusedConv FusedMatMul QLinearAveragePool QLinearGlobalAveragePool")


ALL = range(1 << 16)
# Inputs that determine what is done to the others: constants, or of SIZED sizes.
PARAMETERS: dict[str, Sequence[int]] = {
    **dict.fromkeys(REDUCTIONS, (1,)),
    **dict.fromkeys(("Split", "Unsqueeze", "Squeeze", "TopK", "CumSum", "CumProd", "Tile", "Trilu", "Reshape"), (1,)),
    **dict.fromkeys(("OneHot", "QuantizeLinear", "DequantizeLinear"), (1, 2)),
    **dict.fromkeys(("Slice", "Pad", "Resize"), (1, 2, 3, 4)),
    "Upsample": (1,),
    "Expand": (1,),
    "Dropout": (1, 2),
}
# Inputs that may be sizes, by the operators whose rules expect them.
SIZED: dict[str, Sequence[int]] = {
    **dict.fromkeys(("Slice", "Split", "Unsqueeze", "Squeeze", "Gather", "ConstantOfShape", "Shape"), (0,)),
    "Reshape": (0, 1),
    "Expand": (1,),
    "Resize": (3,),
    "TopK": (1,),  # as many as there are rows: a sort of them all
    "Concat": ALL,
    "Range": ALL,
}


def apply(node: OnnxNode, given: Given, opsets: dict[str, int]) -> list[Value]:
    """The node's outputs; the last stands for those that follow it."""
    what = f"node '{node.name}' ({node.op}) " if node.name else f"a node of {node.op} "
    present = [value for value in given if value is not None]
    # What a node makes of the sizes of its input is known whatever the input's values are.
    bad = worst(present) if node.op != "Shape" else worst([v for v in present if v.kind is Dependence.UNKNOWN])
    if bad is not None:
        return [bad]
    if any(isinstance(value, OnnxGraph) for value in node.attributes.values()):
        return [unknown(f"{what}has a graph of its own, which may take any tensor")]
    if (odd := _odd_input(node, given)) is not None:
        return [unknown(what + odd)]
    rule = _rule(node)
    if rule is None:
        if all(value.kind is Dependence.CONSTANT for value in present) and present:
            return [constant()]
        return [unknown(f"{what}is of an operator whose rows are not followed")]
    found = rule(node, given, opsets.get("", 1))
    if isinstance(found, str):
        return [mixed(what + found)]
    results = found if isinstance(found, list) else [found]
    if node.op != "Shape" and any(value.kind is not Dependence.CONSTANT for value in present):
        # What is computed of rows is no constant; of sizes, only what is known of them is.
        of_rows = bool(of_rows_in(present))
        results = [
            unknown("") if value.kind is Dependence.CONSTANT and (of_rows or value.entries is None) else value
            for value in results
        ]
    return [
        value if value.kind is not Dependence.UNKNOWN else unknown(what + (value.why or "cannot be followed"))
        for value in results
    ]


def _odd_input(node: OnnxNode, given: Given) -> str | None:
    """What forbids any rule: a parameter that is no constant, or sizes where no rule expects them."""
    told = PARAMETERS.get(node.op, ())
    sized = SIZED.get(node.op, ALL if node.op in ELEMENTWISE else ())
    for place, value in enumerate(given):
        if value is None or value.kind is Dependence.CONSTANT:
            continue
        if value.kind is Dependence.SIZES and place not in sized:
            return "computes with the number of rows"
        if place in told and (value.kind is Dependence.ROWS or place not in sized):
            return "takes a parameter for all rows from one row"
    return None


def _rule(node: OnnxNode) -> Rule | None:
    if node.domain == "ai.onnx.ml":
        return _table if node.op in TABLES else None
    if node.domain not in ("", "com.microsoft") or (node.domain == "com.microsoft" and node.op not in MICROSOFT):
        return None
    if node.op in ELEMENTWISE:
        return _elementwise
    if node.op in ALONG_AXIS_0:
        return _along_axis_0
    if node.op in REDUCTIONS:
        return _reduce
    if node.op in MIXING:
        return _mixing
    return RULES.get(node.op) or PRODUCT_RULES.get(node.op) or SHAPE_RULES.get(node.op)


def _axis(value: Value, axis: int) -> int | None:
    """An axis that may count from the end."""
    rank = value.rank
    return None if rank is None else axis + rank if axis < 0 else axis


def _mixing(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    if MIXING[node.op] == "is random":
        return unknown("is random")
    return MIXING[node.op] if of_rows_in(given) else constant()


def _elementwise(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    values = [value for value in given if value is not None]
    if node.op in ("QuantizeLinear", "DequantizeLinear") and all(v.kind is Dependence.CONSTANT for v in values[1:]):
        x, *scales = values
        values = [x]
        if x.kind is Dependence.ROWS and _axis(x, number(node, "axis", 1)) == x.axis and scales and scales[0].rank != 0:
            return unknown("scales rows by their places")
    if any(value.kind is Dependence.SIZES for value in values):
        return arithmetic(node, given)
    found = broadcast(values)
    if isinstance(found, Value) and found.kind is Dependence.CONSTANT:
        folded = arithmetic(node, given)
        return folded if isinstance(folded, Value) and folded.entries is not None else found
    return found


def _along_axis_0(node: OnnxNode, given: Given, _opset: int) -> list[Value] | Value | str:
    x, *rest = given
    if node.op == "BatchNormalization" and number(node, "training_mode", 0):
        return "computes statistics of all rows"
    # Of DeformConv, each row has offsets and a mask of its own.
    own = (2, 4) if node.op == "DeformConv" else ()
    for place, value in enumerate(rest, 1):
        if value is None or value.kind is Dependence.CONSTANT:
            continue
        if place not in own or value.kind is not Dependence.ROWS or not value.plain:
            return unknown("")
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    if x.rank is None or (node.op == "InstanceNormalization" and x.rank < 3):
        return unknown("")
    if x.axis != 0:
        return f"works on axis {x.axis}, along which the rows lie"
    if node.op in ("Resize", "Upsample") and not _keeps_rows(node, x, rest):
        return unknown("may resize the rows' axis")
    keeps = node.op in ("BatchNormalization", "LRN", "InstanceNormalization", "GroupNormalization")
    found = x.shaped(x.dims if keeps else (None,) * x.rank)
    # The places of MaxPool's maxima are counted through all rows.
    return [found, unknown("numbers the elements of all rows")] if node.op == "MaxPool" else found


def _keeps_rows(node: OnnxNode, x: Value, rest: Given) -> bool:
    """Whether Resize or Upsample leaves axis 0 as it is."""
    axes = list_of(node, "axes")
    if axes is not None:
        return all(axis > 0 or axis + (x.rank or 0) > 0 for axis in axes) and 0 not in axes
    wanted = rest[2] if len(rest) > 2 else None
    if wanted is not None:
        return bool(wanted.entries) and wanted.entries[0] == RowCount(1) and x.plain  # type: ignore[index]
    scales = rest[1] if node.op == "Resize" and len(rest) > 1 else rest[0] if rest else None
    return scales is not None and scales.lead == 1.0


def _reduce(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x = given[0]
    if x is None or x.kind is Dependence.CONSTANT:
        return constant()
    if x.kind is Dependence.SIZES:
        return unknown("computes with the number of rows")
    if x.rank is None:
        return unknown("")
    if node.op in ("ArgMax", "ArgMin"):
        axes: tuple[int, ...] = (number(node, "axis", 0),)
    else:
        told = integers_of(node, given, "axes", 1)
        if told is None and len(given) > 1 and given[1] is not None:
            return unknown("")
        if not told and number(node, "noop_with_empty_axes", 0):
            return x
        axes = told or tuple(range(x.rank))
    reduced = {axis + x.rank if axis < 0 else axis for axis in axes}
    if x.axis in reduced:
        return f"reduces axis {x.axis}, along which the rows lie"
    dims = x.dims or ()
    if number(node, "keepdims", 1):
        return x.shaped(tuple(1 if place in reduced else size for place, size in enumerate(dims)))
    before = sum(1 for place in reduced if place < x.axis)
    return x.shaped(tuple(size for place, size in enumerate(dims) if place not in reduced), x.axis - before)


def _normalised(node: OnnxNode, given: Given, _opset: int) -> list[Value] | Value | str:
    """LayerNormalization and its kind: from `axis` on."""
    x = given[0]
    if any(value is not None and value.kind is not Dependence.CONSTANT for value in given[1:]):
        return unknown("")
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    axis = _axis(x, number(node, "axis", -1))
    if axis is None:
        return unknown("")
    # Its other outputs, the means and deviations, have another shape.
    return [x, unknown("")] if x.axis < axis else f"normalises over axis {x.axis}, along which the rows lie"


def _softmax(node: OnnxNode, given: Given, opset: int) -> Value | str:
    x = given[0]
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    axis = _axis(x, number(node, "axis", -1 if opset >= 13 else 1))
    if axis is None:
        return unknown("")
    # Before opset 13 all axes from `axis` on are one.
    over = x.axis == axis if opset >= 13 else x.axis >= axis
    return f"normalises over axis {x.axis}, along which the rows lie" if over else x


def _along(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    """Along one axis: CumSum, TopK and the like."""
    x = given[0]
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    axis: int | None = number(node, "axis", -1)
    if node.op in ("CumSum", "CumProd"):
        told = integers_of(node, given, "", 1)
        axis = told[0] if told else None
    place = None if axis is None else _axis(x, axis)
    if place is None:
        return unknown("")
    if place == x.axis:
        return f"works along axis {place}, along which the rows lie"
    if any(value is not None and value.kind is Dependence.SIZES for value in given[1:]):
        return unknown("computes with the number of rows")
    dims = x.dims or ()
    return x.shaped((*dims[:place], None, *dims[place + 1 :])) if node.op == "TopK" else x


def _table(node: OnnxNode, given: Given, _opset: int) -> list[Value] | Value | str:
    """Of tables [rows, columns]; other ranks mean other things to some of these."""
    values = [value for value in given if value is not None]
    of_rows = of_rows_in(values)
    if not of_rows:
        return constant()
    x = values[0]
    if len(of_rows) != len(values) and (node.op != "ArrayFeatureExtractor" or x.kind is not Dependence.ROWS):
        return unknown("")
    if node.op in ("LabelEncoder", "CategoryMapper"):  # element by element
        return x.shaped(x.dims)
    if node.op == "ZipMap":
        return [unknown("gives no tensor")]
    if any(not value.plain or value.rank != 2 for value in of_rows):
        return unknown("")
    if node.op == "ArrayFeatureExtractor":
        return unknown("chooses among rows") if len(of_rows) > 1 else rows((None, None))
    if node.op == "OneHotEncoder":
        return rows((None, None, None))
    if node.op in ("Binarizer", "Imputer", "Normalizer", "Scaler"):
        return x.shaped(x.dims)
    table = rows((None, None))
    return [rows((None,)), table] if node.op.endswith("Classifier") else table


def _constant(node: OnnxNode, _given: Given, _opset: int) -> Value | str:
    value = node.attributes.get("value")
    if isinstance(value, Constant):
        return replace(constant(value.dims, value.values), lead=value.lead)
    single = node.attributes.get("value_int")
    if isinstance(single, int):
        return constant((), (single,))
    several = list_of(node, "value_ints")
    if several is not None:
        return constant((len(several),), several)
    return constant(() if "value_float" in node.attributes or "value_string" in node.attributes else None)


def _dropout(_node: OnnxNode, given: Given, _opset: int) -> list[Value] | Value | str:
    x, training = given[0], given[2] if len(given) > 2 else None
    return unknown("") if x is None or training is not None else [x, x]


def _one_hot(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    x = given[0]
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    if x.rank is None:
        return unknown("")
    axis = number(node, "axis", -1)
    place = axis + x.rank + 1 if axis < 0 else axis
    dims = x.dims or ()
    return x.shaped((*dims[:place], None, *dims[place:]), x.axis + (place <= x.axis))


def _grid_sample(_node: OnnxNode, given: Given, _opset: int) -> Value | str:
    of_rows = of_rows_in(given)
    if len(of_rows) != 2 or any(not value.plain for value in of_rows):
        return unknown("")
    return of_rows[0].shaped((None,) * (of_rows[0].rank or 0))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _normalised),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("CumSum", "CumProd", "TopK", "LpNormalization"), _along),
    "Constant": _constant,
    "Dropout": _dropout,
    "OneHot": _one_hot,
    "GridSample": _grid_sample,
}
