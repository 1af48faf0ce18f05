"""`export_estimator`: from a fitted scikit-learn estimator or pipeline to a version in a repository; no torch.

XGBoost's and LightGBM's estimators for scikit-learn are converted as well, alone and within pipelines. The contract's
answers are those of the estimator's own predict and predict_proba.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from forwardpass.errors import ExportError
from forwardpass.execution.onnx_runtime import ort
from forwardpass.export import parity
from forwardpass.export.contract_parts import (
    TOLERANCES,
    ExportedModel,
    Values,
    checked,
    doubts_of,
    sample_count,
    scaled,
)  # fmt: skip
from forwardpass.export.input_spec import InputSpec, batch_symbol, draw, fit_samples, parse_inputs
from forwardpass.export.staged_version import StagedVersion
from forwardpass.export.user_code import is_estimator
from forwardpass.model.contract import CONTRACT_FILE, MODEL_FILE, Contract, Samples, Tolerance, compare, file_digest
from forwardpass.model.contract_tensor import ContractTensor
from forwardpass.optional_imports import need

ML_OPSET = 3  # of ai.onnx.ml: the newest that the converters of boosted trees write
_DRAWN_ROWS = max(parity.BATCH_SIZES)


def unpickle(path: Path) -> Any:
    """The estimator in a file of joblib or pickle, which runs whatever code it names. Raises ExportError."""
    try:
        found = need("joblib", "estimators").load(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise ExportError(f"{path}: cannot be unpickled: {type(error).__name__}: {error}") from error
    if not is_estimator(found):
        raise ExportError(f"{path}: holds a {type(found).__name__}; expected a fitted estimator, with fit and predict")
    return found


def export_estimator(
    estimator: Any,
    name: str,
    repository: str | Path,
    *,
    inputs: Mapping[str, str] | Sequence[str | InputSpec] = (),
    version: int | None = None,
    opset: int = 20,
    tolerance: Tolerance | None = None,
    samples: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ExportedModel:
    """Export to `<repository>/<name>/<version>/{model.onnx, contract.json}`, all or nothing.

    `inputs`: one matrix, `x:float32[batch,4]` (the default, as wide as the estimator was fitted); or one for each
    column of the data frame that it was fitted on, `age:float32[batch,1]`, `city:text[batch,1]`. Outputs are `label`
    and `probabilities` of a classifier, `prediction` of any other. The rest is as in `exporter.export`. Raises
    ExportError.
    """
    begin = progress or (lambda _stage: None)
    staging = StagedVersion(Path(repository), name, version)
    specs = parse_inputs(inputs, text=True) if inputs else own_inputs(estimator)
    batch = batch_symbol(specs)
    if batch is None or any(len(spec.dims) != 2 or isinstance(spec.dims[1], str) for spec in specs):
        raise ExportError(f"inputs: expected NAME:DTYPE[batch,WIDTH] each, got {', '.join(map(str, specs))}")
    rows = _rows(specs, batch, samples)
    begin("asking the estimator")
    expected = _expected(estimator, specs, rows)
    begin("converting it to ONNX")
    model = _named(_converted(estimator, specs, opset), list(expected))
    tolerance = tolerance or scaled(TOLERANCES[np.dtype(np.float32)], expected)
    with staging:
        path = staging.write(MODEL_FILE, model)
        runner = parity.OnnxRunner(path)
        begin("checking it against the estimator")
        parity.check_outputs_follow(runner, rows, batch)
        independence = parity.row_independence(runner, rows, _DRAWN_ROWS, tolerance)
        found = compare(runner.run(rows), expected, tolerance)
        if found.failure is not None:
            raise ExportError(f"the converted estimator answers differently from {_called(estimator)}: {found.failure}")
        count = sample_count(rows)
        sample, answers = parity.take(rows, slice(count)), parity.take(expected, slice(count))
        contract = checked(
            Contract,
            model=name,
            version=version or 1,
            files={MODEL_FILE: file_digest(path)},
            inputs=[_input(spec, estimator) for spec in specs],
            outputs=[_output(tensor, expected[tensor.name], estimator) for tensor in runner.outputs],
            batchable=True,
            batch_invariant=independence.bit_identical,
            rows_independent=independence.within_tolerance,
            opset=opset,
            torch=f"none: {_called(estimator)}",
            onnxruntime=ort.__version__,
            provider=parity.PROVIDER,
            samples=Samples.from_arrays(count, sample, answers),
            tolerance=tolerance,
            largest_difference=found.largest,
        )
        contract.check(runner.run(contract.input_arrays()))

        def numbered(number: int) -> Contract:
            return contract.model_copy(update={"version": number})

        place = staging.publish(lambda folder, number: numbered(number).save(folder / CONTRACT_FILE))
    doubts = doubts_of(answers, drawn=samples is None)
    return ExportedModel(place, numbered(int(place.name)), 0, independence.largest, doubts)


def own_inputs(estimator: Any) -> list[InputSpec]:
    """One matrix as wide as the estimator was fitted. Raises ExportError where that is not known, or was a table."""
    columns = getattr(estimator, "feature_names_in_", None)
    width = getattr(estimator, "n_features_in_", None)
    if columns is not None:
        named = ", ".join(map(str, columns[:8]))
        raise ExportError(
            f"{_called(estimator)} was fitted on a table: give each of its columns ({named}) as an input, as in "
            "'age:float32[batch,1]' or 'city:text[batch,1]', or all as one matrix, as in 'x:float32[batch,8]'"
        )
    if width is None:
        raise ExportError(f"{_called(estimator)} has no number of features: expected a fitted one, or its inputs")
    return parse_inputs([f"x:float32[batch,{width}]"])


def _rows(specs: Sequence[InputSpec], batch: str, samples: Mapping[str, Any] | None) -> Values:
    if samples is not None:
        rows, sizes = fit_samples(specs, samples)
        if sizes[batch] < _DRAWN_ROWS:
            rows = parity.take(rows, np.arange(_DRAWN_ROWS) % sizes[batch])
        return rows
    wordy = [spec.name for spec in specs if spec.dtype.kind == "O"]
    if wordy:
        raise ExportError(f"text cannot be drawn at random, and {', '.join(wordy)} is text: give rows (--samples)")
    return draw(specs, {batch: _DRAWN_ROWS}, 4, np.random.default_rng(0))


def _expected(estimator: Any, specs: Sequence[InputSpec], rows: Values) -> dict[str, NDArray[Any]]:
    """The estimator's own answers by the outputs' names; floats as float64."""
    if len(specs) == 1 and specs[0].name not in getattr(estimator, "feature_names_in_", ()):
        given: Any = rows[specs[0].name]
    else:
        pandas = need("pandas", "estimators")
        given = pandas.DataFrame({spec.name: rows[spec.name][:, 0] for spec in specs})
    try:
        answer = np.asarray(estimator.predict(given))
        if not hasattr(estimator, "predict_proba"):
            wide = answer.astype(np.float64) if answer.dtype.kind in "fiu" else answer.astype(object)
            return {"prediction": wide.reshape(len(answer), -1)}
        probabilities = np.asarray(estimator.predict_proba(given))
    except Exception as error:
        raise ExportError(f"{_called(estimator)} fails on the rows: {type(error).__name__}: {error}") from error
    label = answer.astype(np.int64) if answer.dtype.kind in "biu" else answer.astype(object)
    return {"label": label, "probabilities": probabilities.astype(np.float64)}


def _converted(estimator: Any, specs: Sequence[InputSpec], opset: int) -> onnx.ModelProto:
    skl2onnx = need("skl2onnx", "estimators")
    _register_boosted_trees()
    kinds = [(spec.name, _tensor_type(spec)) for spec in specs]
    options = {id(estimator): {"zipmap": False}} if hasattr(estimator, "predict_proba") else None
    try:
        model: onnx.ModelProto = skl2onnx.convert_sklearn(
            estimator, initial_types=kinds, options=options, target_opset={"": opset, "ai.onnx.ml": ML_OPSET}
        )
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ExportError(f"{_called(estimator)} cannot be converted: {type(error).__name__}: {text}") from error
    return model


def _tensor_type(spec: InputSpec) -> Any:
    from skl2onnx.common import data_types

    kinds = {"O": data_types.StringTensorType, "b": data_types.BooleanTensorType}
    by_name = {"float32": data_types.FloatTensorType, "float64": data_types.DoubleTensorType,
               "int64": data_types.Int64TensorType, "int32": data_types.Int32TensorType}  # fmt: skip
    kind = kinds.get(spec.dtype.kind) or by_name.get(spec.dtype.name)
    if kind is None:
        raise ExportError(f"input '{spec}': expected one of {', '.join(by_name)}, bool, text")
    return kind([None, spec.dims[1]])


def _register_boosted_trees() -> None:
    """Make the converters of XGBoost's and LightGBM's estimators known, where the packages are installed."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common import shape_calculator

    zipmap = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    classes, numbers = (
        shape_calculator.calculate_linear_classifier_output_shapes,
        shape_calculator.calculate_linear_regressor_output_shapes,
    )
    try:
        import lightgbm
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
    except ImportError:
        pass
    else:
        update = update_registered_converter
        update(lightgbm.LGBMClassifier, "LightGbmLGBMClassifier", classes, convert_lightgbm, options=zipmap)
        update(lightgbm.LGBMRegressor, "LightGbmLGBMRegressor", numbers, convert_lightgbm, options={"split": None})
    try:
        import xgboost
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
    except ImportError:
        pass
    else:
        update = update_registered_converter
        update(xgboost.XGBClassifier, "XGBoostXGBClassifier", classes, convert_xgboost, options=zipmap)
        update(xgboost.XGBRegressor, "XGBoostXGBRegressor", numbers, convert_xgboost)


def _named(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """The serialized model, its outputs renamed and without a date or the like."""
    graph = model.graph
    if len(graph.output) != len(names):
        raise ExportError(f"the converted estimator has {len(graph.output)} outputs; expected {', '.join(names)}")
    own = [value.name for value in graph.output]
    renamed = dict(zip(own, names, strict=True))
    renamed |= {name: f"{name}.inner" for name in names if name not in own}  # a tensor between, if there is one
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value, name in zip(graph.output, names, strict=True):
        value.name = name
    return bytes(model.SerializeToString(deterministic=True))


def _input(spec: InputSpec, estimator: Any) -> ContractTensor:
    """With the names of its columns, where the estimator was fitted on a table and takes it as one matrix."""
    tensor = spec.tensor()
    columns = [str(column) for column in getattr(estimator, "feature_names_in_", ())]
    return tensor.model_copy(update={"labels": columns}) if len(columns) == tensor.shape[1] > 1 else tensor


def _output(tensor: ContractTensor, expected: NDArray[Any], estimator: Any) -> ContractTensor:
    """With a batch axis, which converters may leave out, and the classes as labels of probabilities."""
    classes = [str(label) for label in getattr(estimator, "classes_", ())]
    labels = classes if tensor.name == "probabilities" and len(classes) == expected.shape[-1] else None
    return tensor.model_copy(update={"shape": [-1, *expected.shape[1:]], "labels": labels})


def _called(estimator: Any) -> str:
    package = type(estimator).__module__.partition(".")[0]
    version = getattr(__import__(package), "__version__", "")
    return f"{type(estimator).__name__} of {package} {version}".rstrip()
