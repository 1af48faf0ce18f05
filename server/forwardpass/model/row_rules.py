"""What each operator does to rows: from what is known of a node's inputs to what is known of its outputs. Pure.

A rule may only claim ROWS where every element of a row of the output is computed from that row of the inputs, whatever
the values are. What no rule covers is unknown. Operators: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from forwardpass.model.onnx_file import Constant, OnnxNode
from forwardpass.model.row_products import PRODUCT_RULES
from forwardpass.model.row_shapes import SHAPE_RULES
from forwardpass.model.row_sizes import Given, Rule, arithmetic, integers_of, list_of, number, of_rows_in
from forwardpass.model.row_values import Dependence, Value, broadcast, constant, mixed, rows, unknown, worst


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
    SVMClassifier SVMRegressor Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor ZipMap CastMap
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


def apply(node: OnnxNode, given: Given, opsets: dict[str, int]) -> list[Value]:
    """The node's outputs; the last stands for those that follow it."""
    what = f"node '{node.name}' ({node.op}) " if node.name else f"a node of {node.op} "
    present = [value for value in given if value is not None]
    # What a node makes of the sizes of its input is known whatever the input's values are.
    bad = worst(present) if node.op != "Shape" else worst([v for v in present if v.kind is Dependence.UNKNOWN])
    if bad is not None:
        return [bad]
    rule = _rule(node)
    if rule is None:
        if all(value.kind is Dependence.CONSTANT for value in present) and present:
            return [constant()]
        return [unknown(f"{what}is of an operator whose rows are not followed")]
    found = rule(node, given, opsets.get("", 1))
    if isinstance(found, str):
        return [mixed(what + found)]
    results = found if isinstance(found, list) else [found]
    return [
        value if value.kind is not Dependence.UNKNOWN else unknown(what + (value.why or "cannot be followed"))
        for value in results
    ]


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
    keeps = node.op in ("BatchNormalization", "LRN", "InstanceNormalization", "GroupNormalization")
    found = x.shaped(x.dims if keeps else (None,) * x.rank)
    # The places of MaxPool's maxima are counted through all rows.
    return [found, unknown("numbers the elements of all rows")] if node.op == "MaxPool" else found


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


def _normalised(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    """LayerNormalization and its kind: from `axis` on."""
    x = given[0]
    if any(value is not None and value.kind is not Dependence.CONSTANT for value in given[1:]):
        return unknown("")
    if x is None or x.kind is not Dependence.ROWS:
        return constant()
    axis = _axis(x, number(node, "axis", -1))
    if axis is None:
        return unknown("")
    return x if x.axis < axis else f"normalises over axis {x.axis}, along which the rows lie"


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
    dims = x.dims or ()
    return x.shaped((*dims[:place], None, *dims[place + 1 :])) if node.op == "TopK" else x


def _table(node: OnnxNode, given: Given, _opset: int) -> Value | str:
    values = [value for value in given if value is not None]
    of_rows = of_rows_in(values)
    if not of_rows:
        return constant()
    if any(not value.plain for value in of_rows):
        return unknown("")
    if node.op == "FeatureVectorizer" and len(of_rows) != len(values):
        return unknown("")
    if node.op == "ArrayFeatureExtractor" and ((values[0].rank or 0) < 2 or len(of_rows) > 1):
        return unknown("chooses among rows")
    return rows((None, None))


def _constant(node: OnnxNode, _given: Given, _opset: int) -> Value | str:
    value = node.attributes.get("value")
    if isinstance(value, Constant):
        return constant(value.dims, value.values)
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
