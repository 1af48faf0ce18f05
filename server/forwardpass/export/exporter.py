"""`export`: from a torch module to a version in a repository. Connects the other modules of this package.

Nothing is written to the repository before the network has run, and nothing stays there unless all checks pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from forwardpass.errors import ExportError
from forwardpass.execution.onnx_runtime import ort
from forwardpass.export import fp16_tolerance, parity
from forwardpass.export.contract_parts import (
    TOLERANCES,
    ExportedModel,
    Labels,
    Words,
    checked,
    described,
    doubts_of,
    sample_count,
    scaled,
)
from forwardpass.export.fp16_process import halve_apart
from forwardpass.export.hidden_outputs import expose
from forwardpass.export.input_spec import InputSpec, batch_symbol, draw, fit_samples, parse_inputs, symbols
from forwardpass.export.staged_version import StagedVersion
from forwardpass.export.torch_network import TorchNetwork
from forwardpass.export.translate import translate
from forwardpass.model.contract import (
    CONTRACT_FILE,
    MODEL_FILE,
    Contract,
    Samples,
    Tolerance,
    file_digest,
)

# Rows tried if the caller passes none: the size of the largest batch tried.
_DRAWN_ROWS = max(parity.BATCH_SIZES)
# Indices must stay within their lookup tables, whose sizes are unknown: the widest range that runs is used.
_INTEGER_BOUNDS = (128, 16, 4, 2, 1)

Values = dict[str, NDArray[Any]]


def export(
    module: torch.nn.Module,
    inputs: Mapping[str, str] | Iterable[str | InputSpec],
    name: str,
    repository: str | Path,
    *,
    version: int | None = None,
    outputs: Sequence[str] | None = None,
    labels: Labels | None = None,
    categories: Words | None = None,
    opset: int = 20,
    tolerance: Tolerance | None = None,
    samples: Mapping[str, Any] | None = None,
    source: str | None = None,
    expose_hidden: bool = False,
    precision: Literal["native", "fp16"] = "native",
    progress: Callable[[str], None] | None = None,
) -> ExportedModel:
    """Export a network to `<repository>/<name>/<version>/{model.onnx, contract.json}`, all or nothing.

    - `inputs`: `{"x": "float32[batch,64]"}`, or `["x:float32[batch,64]"]`. They are passed to forward by
      name if all names match its parameters (`**kwargs` matches any), else in their order. A symbol that is axis 0 of
      every input, and no other axis, is the batch: then every output must have a row for every input row.
    - `version`: the next free number if None. An existing version is never overwritten.
    - `outputs`: their names; by default the keys or fields of forward's dict, named tuple or dataclass (None is left
      out), or `output`, or `output_0`, `output_1`, ...
    - `labels`: the names of the indices of the output's last axis: its classes. A mapping by tensor for several
      outputs, and for inputs, whose last axis are columns of a table.
    - `categories`: by input of integers, what its values 0, 1, ... stand for; clients send the words.
    - `tolerance`: the allowed difference from the float64 reference; None uses `TOLERANCES`, or for half precision
      the measured difference, with a margin.
    - `samples`: rows to check parity on, arrays [rows, ...] by input; the first few go into the contract. If None
      they are drawn: standard normal for floats, small integers, with a fixed seed.
    - `source`: a digest of the model's source, stored in the contract unchanged.
    - `expose_hidden`: the activations between layers become outputs `a1`, `a2`, ..., returned only if requested.
    - `precision`: "native" computes as the module does; "fp16" takes a module in float32 and keeps its layers' weights
      and activations in half precision. Inputs, their preparation for the first product, and outputs stay float32.
    - `progress` is called with a few words before each stage that takes time.

    The module is not changed. Raises ExportError if the export is impossible or a check fails, naming what differed,
    where, and by how much. Not thread-safe; several processes may export the same model.
    """
    tell = progress or (lambda _stage: None)
    staging = StagedVersion(Path(repository), name, version)
    network = TorchNetwork(module, parse_inputs(inputs))
    batch = batch_symbol(network.specs)
    tell("running the network")
    rows, sizes = _rows(network, samples, batch, outputs)
    coarsest = network.coarsest(rows)
    if precision == "fp16" and coarsest != np.float32:
        raise ExportError(f"half precision: expected a network in float32, got {coarsest}: it is exported as it is")
    tell("translating to ONNX")
    model = translate(network, _example(network, sizes, batch), opset)
    hidden: list[str] = []
    if expose_hidden:
        model, hidden = expose(model)
    rounding = 0.0
    if precision == "fp16":
        tell("measuring half precision")
        model = halve_apart(model, rows)
        tolerance, rounding = fp16_tolerance.hold(model, network, _trials(network, rows, sizes, batch), tolerance)
    expected = network.expected(rows)
    tolerance = tolerance or scaled(TOLERANCES[coarsest], expected)
    with staging:
        path = staging.write(MODEL_FILE, model)
        runner = parity.OnnxRunner(path)
        runner.check_inputs(network.specs)
        tell("checking it against the reference")
        independence = None
        if batch is not None:
            parity.check_outputs_follow(runner, rows, batch)
            independence = parity.row_independence(runner, rows, _DRAWN_ROWS, tolerance)
        largest = parity.check_parity(runner, network, _trials(network, rows, sizes, batch), tolerance)
        count = sample_count(rows) if batch is not None else 1
        sample = parity.take(rows, slice(count)) if batch is not None else rows
        doubts = doubts_of(network.expected(sample), drawn=samples is None)
        own = [tensor for tensor in runner.outputs if tensor.name not in hidden]
        input_tensors, output_tensors = described([spec.tensor() for spec in network.specs], own, labels, categories)
        contract = checked(
            Contract,
            model=name,
            version=version or 1,
            files={MODEL_FILE: file_digest(path)},
            inputs=input_tensors,
            outputs=output_tensors,
            hidden=[tensor for tensor in runner.outputs if tensor.name in hidden],
            batchable=batch is not None,
            batch_invariant=independence.bit_identical if independence is not None else None,
            rows_independent=independence.within_tolerance if independence is not None else None,
            opset=opset,
            torch=torch.__version__,
            onnxruntime=ort.__version__,
            provider=parity.PROVIDER,
            reference=network.reference,
            precision=precision,
            source=source,
            samples=Samples.from_arrays(count, sample, network.expected(sample)),
            tolerance=tolerance,
            largest_difference=max(largest, rounding),
        )
        # The check that a server makes at every start, here before the version becomes visible.
        contract.check(runner.run(contract.input_arrays()))

        def numbered(number: int) -> Contract:
            return contract.model_copy(update={"version": number})

        place = staging.publish(lambda folder, number: numbered(number).save(folder / CONTRACT_FILE))
    return ExportedModel(
        path=place,
        contract=numbered(int(place.name)),
        parameters=network.parameters,
        row_difference=independence.largest if independence is not None else None,
        doubts=doubts,
    )


def _rows(
    network: TorchNetwork, samples: Mapping[str, Any] | None, batch: str | None, outputs: Sequence[str] | None
) -> tuple[Values, dict[str, int]]:
    """The values to try, at least `_DRAWN_ROWS` rows if there is a batch, and the sizes of all symbols in them."""
    if samples is not None:
        rows, sizes = fit_samples(network.specs, samples)
        if batch is not None and sizes[batch] < _DRAWN_ROWS:
            rows = parity.take(rows, np.arange(_DRAWN_ROWS) % sizes[batch])
            sizes[batch] = _DRAWN_ROWS
        network.try_on(rows, outputs)
        return rows, sizes
    sizes = _sizes(network, batch, first=5, step=2)
    has_integers = any(spec.dtype.kind in "iu" for spec in network.specs)
    for bound in _INTEGER_BOUNDS if has_integers else _INTEGER_BOUNDS[-1:]:
        rows = draw(network.specs, sizes, bound, np.random.default_rng(0))
        try:
            network.try_on(rows, outputs)
            break
        except ExportError:
            if bound == _INTEGER_BOUNDS[-1]:
                raise
    return rows, sizes


def _sizes(network: TorchNetwork, batch: str | None, first: int, step: int) -> dict[str, int]:
    """A size for every symbol, all different if `step` is not 0."""
    others = [symbol for symbol in symbols(network.specs) if symbol != batch]
    sizes = {symbol: first + step * i for i, symbol in enumerate(others)}
    return sizes if batch is None else {**sizes, batch: _DRAWN_ROWS}


def _example(network: TorchNetwork, sizes: Mapping[str, int], batch: str | None) -> Values:
    """The values that torch traces with: only shapes matter; torch would treat a size of 1 as a constant."""
    if any(size == 1 for size in sizes.values()):
        sizes = _sizes(network, batch, first=5, step=2)
    if batch is not None:
        sizes = {**sizes, batch: 3}
    return draw(network.specs, sizes, 1, np.random.default_rng(0))


def _trials(network: TorchNetwork, rows: Values, sizes: Mapping[str, int], batch: str | None) -> Iterator[Values]:
    """All batches that parity is checked on: every size, all rows, and other sizes of the other symbols."""
    if batch is None:
        yield rows
    else:
        for count in parity.BATCH_SIZES:
            yield parity.take(rows, slice(count))
        for start in range(_DRAWN_ROWS, sizes[batch], _DRAWN_ROWS):
            yield parity.take(rows, slice(start, start + _DRAWN_ROWS))
    if len(sizes) == (batch is not None):
        return
    bound = 1 + max((int(rows[spec.name].max()) for spec in network.specs if spec.dtype.kind in "iu"), default=0)
    for first, step in ((12, 3), (1, 0), (2, 0)):
        drawn = draw(network.specs, _sizes(network, batch, first, step), bound, np.random.default_rng(first))
        # Not every network takes every size (a kernel may need more); sizes that the original rejects prove nothing.
        if network.takes(drawn):
            yield drawn
            if batch is not None:
                yield parity.take(drawn, slice(1))
