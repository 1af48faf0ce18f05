"""A network as ONNX Runtime executes it: the fused nodes, the time of each, and the intermediate tensors.

Sessions are configured like the server's: one thread per run, no spinning. Times come from the runtime's own profiler,
which has microsecond resolution, so many runs are averaged; profiling itself adds a little per node.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import InsightError
from forwardpass.execution.onnx_runtime import ort
from forwardpass.execution.ort_session import read_signature, reason
from forwardpass.model.contract import Contract
from forwardpass.model.example_inputs import example
from forwardpass.model.onnx_graph import Graph
from forwardpass.optional_imports import need

VERSION = str(ort.__version__)
PROVIDER = "CPUExecutionProvider"
_WARM_UP = 10  # runs excluded from the average: they allocate memory and load code
_MOST_RUNS = 2000  # the profiler keeps every event in memory
Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Step:
    """One node that the runtime executes, which may cover several of the file's nodes."""

    name: str
    op: str
    covers: tuple[str, ...]  # names of the file's nodes
    microseconds: float  # mean per run


@dataclass(frozen=True, slots=True)
class Execution:
    """The execution of one batch by the runtime."""

    steps: tuple[Step, ...]
    folded: tuple[str, ...]  # the file's nodes folded into constants at load, or not needed
    run_microseconds: float  # median of a whole run, without the profiler
    runs: int

    @property
    def node_microseconds(self) -> float:
        return sum(step.microseconds for step in self.steps)


def example_rows(graph: Graph, contract: Contract | None) -> dict[str, NDArray[Any]]:
    """`graph.rows` rows to run: the contract's samples, repeated, or random ones. [rows, ...] by input name."""
    session = _session(graph.model.SerializeToString(), _options())
    signature = read_signature(session)
    rng = np.random.default_rng(0)
    if contract is not None:
        return {k: np.resize(v, (graph.rows, *v.shape[1:])) for k, v in contract.input_arrays().items()}
    rows = {tensor.name: example(tensor, graph.rows, rng) for tensor in signature.inputs}
    # A first axis of fixed size is not a batch axis.
    return {
        t.name: rows[t.name] if not t.shape or t.shape[0] < 0 else np.resize(rows[t.name], (t.shape[0], *t.shape[1:]))
        for t in signature.inputs
    }


def tensors(graph: Graph, names: Sequence[str], feeds: Feeds) -> dict[str, NDArray[Any]]:
    """The named tensors for the rows in `feeds`; they need not be outputs of the file. Raises InsightError."""
    onnx = need("onnx", "insight")
    opened = onnx.ModelProto()
    opened.CopyFrom(graph.model)
    given = {value.name for value in opened.graph.output}
    for name in dict.fromkeys(names):
        if name not in given:
            dtype = graph.dtypes.get(name, np.dtype(np.float32))
            kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
            opened.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = _session(opened.SerializeToString(), _options())
    wanted = list(dict.fromkeys(names))
    return dict(zip(wanted, run(session, wanted, feeds), strict=True))


def run(session: Any, names: Sequence[str] | None, feeds: Feeds) -> list[NDArray[Any]]:
    """Run the session once. Raises InsightError with the runtime's reason."""
    try:
        found: list[NDArray[Any]] = session.run(names, dict(feeds))
    except Exception as error:
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
        raise InsightError(f"the network cannot be run on {shapes}: {reason(error)}") from None
    return found


def execute(graph: Graph, path: Path, feeds: Feeds, seconds: float = 0.15) -> Execution:
    """Run the file at `path` for about `seconds` with the profiler and as long without it. Raises InsightError."""
    plain = _session(str(path), _options())
    times = _timed(plain, feeds, seconds)
    runs = max(1, min(_MOST_RUNS, int(seconds / max(statistics.median(times), 1e-6))))
    with tempfile.TemporaryDirectory(prefix="forwardpass-trace-") as folder:
        options = _options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = _session(str(path), options)
        for _ in range(runs + _WARM_UP):
            run(session, None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
        optimized = need("onnx", "insight").load(
            options.optimized_model_filepath, load_external_data=False
        )  # only nodes count
    spent = _per_node(events)
    covered = cover(graph, optimized)
    steps = []
    unnamed: dict[str, int] = {}
    for place, node in enumerate(optimized.graph.node):
        # The runtime names an unnamed node by its operator and a number.
        key = node.name
        if not key:
            same = [k for k in spent if k.startswith(f"{node.op_type}_") and k[len(node.op_type) + 1 :].isdecimal()]
            same.sort(key=lambda k: (len(k), k))
            nth = unnamed[node.op_type] = unnamed.get(node.op_type, -1) + 1
            key = same[nth] if nth < len(same) else ""
        steps.append(Step(key or node.op_type, node.op_type, covered[place], spent.get(key, 0.0)))
    seen = {name for names in covered for name in names}
    folded = tuple(node.name for node in graph.nodes if node.name not in seen)
    return Execution(tuple(steps), folded, statistics.median(times) * 1e6, runs)


def cover(graph: Graph, optimized: Any) -> list[tuple[str, ...]]:
    """For each node of an optimised model, the original nodes that it covers, in their original order.

    Walks back through the original from the optimised node's outputs to the outputs of other optimised nodes.
    """
    produced = {name for node in optimized.graph.node for name in node.output if name}
    order = {node.name: place for place, node in enumerate(graph.nodes)}
    covered = []
    for node in optimized.graph.node:
        found: set[str] = set()
        pending = [name for name in node.output if name]
        own = set(pending)
        while pending:
            source = graph.producers.get(pending.pop())
            if source is None or source.name in found or graph.is_fixed(source):
                continue
            found.add(source.name)
            pending += [name for name in source.inputs if name and (name not in produced or name in own)]
        covered.append(tuple(sorted(found, key=order.__getitem__)))
    return covered


def _per_node(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean microseconds by node over all runs except the warm-up."""
    spent: dict[str, list[int]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            spent.setdefault(name.removesuffix("_kernel_time"), []).append(int(event["dur"]))
    return {name: statistics.fmean(times[_WARM_UP:] or times) for name, times in spent.items()}


def _timed(session: Any, feeds: Feeds, seconds: float) -> list[float]:
    """Seconds of individual runs, after a warm-up."""
    for _ in range(_WARM_UP):
        run(session, None, feeds)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run(session, None, feeds)
        times.append(time.perf_counter() - start)
    return times


def _options() -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(model: str | bytes, options: Any) -> Any:
    try:
        return ort.InferenceSession(model, options, providers=[PROVIDER])
    except Exception as error:
        raise InsightError(f"ONNX Runtime cannot open the network: {reason(error)}") from None
