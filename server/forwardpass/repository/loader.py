"""One model version from its folder to a worker that is ready: verify, open, replay, probe, warm. No requests yet.

Every step can fail, with a ModelError that has the reason; all that was opened is then closed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from forwardpass.batching.admission import Admission
from forwardpass.batching.request import WorkerOptions
from forwardpass.errors import ConfigError, ContractError, ModelError, RequestError, SettingsError
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.execution.interruption import Interruption
from forwardpass.execution.placement import CPU, Devices, Placement
from forwardpass.execution.providers import OpenSession, open_session, place
from forwardpass.execution.reshaped_session import in_client_shape
from forwardpass.execution.session import Runnable
from forwardpass.inference.tensor_contents import ELEMENT_LIMIT
from forwardpass.inference.worker import Worker
from forwardpass.model import external_data
from forwardpass.model.contract import CONTRACT_FILE, Contract
from forwardpass.model.example_inputs import with_sizes
from forwardpass.model.network_memory import network_memory
from forwardpass.model.network_shape import network_shape
from forwardpass.model.onnx_file import OnnxFile, read_onnx
from forwardpass.model.options import ModelConfig
from forwardpass.model.row_flow import UNPROVED, Proof, RowFlow, prove_graph
from forwardpass.model.run_length import varies
from forwardpass.model.signature import ModelSignature
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.repository import batch_size, warm_up
from forwardpass.repository.batch_invariance import Invariance, batched_outputs, probe, probe_again
from forwardpass.repository.reconcile import reconcile
from forwardpass.repository.session_pool import SessionPool, count, inline_run_limit
from forwardpass.repository.shared_measurements import SharedMeasurements
from forwardpass.repository.worker_options import limits, queue_timeouts
from forwardpass.settings import Settings

logger = logging.getLogger(__name__)

ORT_FORMAT = ".ort"  # ONNX Runtime's own format, which has no graph that could be looked at here


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A worker, not yet started, and what is known of it: for the start-up report and the model's metadata."""

    worker: Worker
    placement: Placement
    invariance: Invariance
    why: str
    contract: Contract | None
    config: ModelConfig
    seconds: float  # that loading took
    memory: int = 0  # bytes that it takes on the CPU, by its files
    reservation: str = ""  # what clients should know of how it is served, though it is READY

    @property
    def batches(self) -> bool:
        """Whether requests share runs."""
        return self.invariance.batches and self.config.batching

    @property
    def max_batch_size(self) -> int:
        """Rows of the largest run; 0 where axis 0 is not a batch, or where a run is as large as its request."""
        return self.worker.run_rows if self.invariance.batches else 0


@dataclasses.dataclass(frozen=True, slots=True)
class LoadRequest:
    """A version to load, the options to load it by, and the objects that its worker needs."""

    name: str
    version: str
    folder: Path  # of the version
    config: ModelConfig
    settings: Settings
    cores: CpuBudget
    admission: Admission
    model_folder: Path | None = None  # where labels and the like are; by default that above the version
    metrics: ModelMetrics | None = None  # where to go on counting
    lost: Callable[[str], None] = lambda _: None  # see Worker
    interruption: Interruption | None = None  # ends the load early, with Stopping
    shared: SharedMeasurements = dataclasses.field(default_factory=SharedMeasurements)
    opens: OpenSession = open_session  # for tests, on devices that are not there, as `look`
    look: Callable[[], Devices] | None = None


def load(request: LoadRequest) -> LoadedModel:
    """Load a version. Raises ModelError; may take seconds."""
    name, version, folder, config = request.name, request.version, request.folder, request.config
    settings, cores = request.settings, request.cores
    began = time.monotonic()
    interruption = request.interruption or Interruption()
    model_folder = request.model_folder or folder.parent
    for ignored in config.origin.ignored:
        logger.warning("model %s version %s: %s", name, version, ignored)
    path = _network_file(folder, config.model_file)
    contract = _contract(folder)
    in_onnx = path.suffix != ORT_FORMAT
    if in_onnx:
        external_data.check(path, model_folder)
    placement = _placement(config, settings, cores, request.look)
    label, shared = f"{name}/{version}", request.shared
    with (
        shared.measuring(placement),
        SessionPool(path, placement, config, label, request.opens, interruption.opening) as sessions,
    ):
        session = interruption.network(sessions.first)
        signature = reconcile(session.signature, config, contract, model_folder)
        _check_sizes(signature)
        replayed = _replay(session, contract) if contract is not None else ""
        sessions.reshape(signature)
        unshaped, session = session, interruption.network(sessions.first)
        samples = _samples(signature, contract)
        if config.max_batch_size != 0:
            signature = batched_outputs(signature, session, samples)
        every = tuple(range(len(signature.outputs)))
        # What values are made up by: axes beyond the batch that may have any size get one that the network takes.
        sized = signature if samples is not None else with_sizes(signature, lambda arrays: session.run(arrays, every))
        told = config.max_batch_size if config.max_batch_size is not None else settings.max_batch_size or None
        clock = batch_size.clock_of(placement)
        file, unread = _graph_of(path) if in_onnx else (None, UNPROVED)
        proof = prove_graph(file) if signature.batchable and file is not None else unread
        settled = _settled(signature, config, contract, proof)
        unpredictable = varies(file, signature)
        shape = None if unpredictable else _shape(path, sized, placement, config, samples)
        if settled is not None and not settled[0].batches:
            wanted, measured = told if told is not None else 1, ""
        else:
            sizes = shared.sizes.get(
                shape and (shape, told), label, lambda: batch_size.choose(sized, session, told, samples, clock)
            )
            wanted, measured = sizes.value
            measured += f" (of {sizes.model}, of the same shape)" * bool(measured and not sizes.now)
        # Then a row may differ from batch to batch by more than the rounding of the outputs' type.
        half = placement.allow_tf32 or (contract is not None and contract.precision == "fp16")
        probes = _Probes(sized, session, samples, wanted, half, proof)
        invariance, why = settled or probes.made(shared, shape, label)
        batches = invariance.batches and wanted > 0
        if invariance is Invariance.NONE:
            signature = dataclasses.replace(signature, batchable=False)  # axis 0 is like any other from here on
        run_rows = wanted if batches else 1
        how = ""
        if placement.devices:
            each, _ = count(config, settings, cores, placement, 0.0)
            how = sessions.prepare(
                each, signature, run_rows, pads=batches, samples=samples, half=half, check_stop=interruption.check
            )
            if contract is not None:
                replayed = _replay(unshaped, contract)  # once more, in the way in which it will be run
        timed = shared.run_times.get(
            shape and (shape, run_rows, signature.batchable),
            label,
            lambda: warm_up.every_size(sized, session, run_rows, samples, clock),
        )
        if not timed.now:
            warm_up.smallest_and_largest(sized, session, run_rows, samples)
        warm_up.as_told(signature, session, config, model_folder)
    if unpredictable:
        logger.info(
            "model %s version %s: its runs are handed to a thread of their own, since they take as long as values say: "
            "%s", name, version, unpredictable,
        )  # fmt: skip
    instances, reason = count(config, settings, cores, placement, timed.value.largest)
    placement = dataclasses.replace(placement, why="; ".join(filter(None, (placement.why, reason, how))))
    options = WorkerOptions(
        limits=limits(config, wanted if batches and config.batching else 1),
        instances=instances * max(1, len(placement.devices)),
        run_rows=run_rows,
        row_independent=batches,
        max_request_rows=config.max_request_rows,
        priority_levels=config.priority_levels,
        default_priority=config.default_priority,
        queue_timeouts=queue_timeouts(config),
        inline_run_limit=0.0 if unpredictable else inline_run_limit(settings, cores),
        shrink_arena=config.shrink_memory_arena and placement.provider == CPU,
    )
    counted = request.metrics or ModelMetrics(name, version)
    for session_of_instance in sessions.serving:
        session_of_instance.report_to(counted.gpu.ran)
    worker = Worker(
        name,
        version,
        sessions.serving,
        signature,
        options=options,
        run_time=copy.copy(timed.value.model),
        metrics=counted,
        admission=request.admission,
        lost=request.lost,
    )
    reservation = _reservation(invariance, why, contract)
    if reservation:
        logger.warning("model %s version %s: %s", name, version, reservation)
    known = "; ".join(filter(None, (why, replayed, measured if batches else "")))
    seconds, memory = time.monotonic() - began, 0 if placement.devices else network_memory(path)
    return LoadedModel(worker, placement, invariance, known, contract, config, seconds, memory, reservation)


def _graph_of(path: Path) -> tuple[OnnxFile | None, Proof]:
    """The file's graph, or why nothing can be proved of it."""
    try:
        return read_onnx(path), UNPROVED
    except ModelError as error:
        return None, Proof(RowFlow.UNKNOWN, str(error))


def _network_file(folder: Path, model_file: str) -> Path:
    """A version's network: the file of that name, or in a folder of that name the file of that name."""
    path = folder / model_file
    if path.is_dir():
        path /= model_file
    if not path.is_file():
        raise ModelError(f"{folder}: there is no {path.relative_to(folder)}")
    return path


def _contract(folder: Path) -> Contract | None:
    path = folder / CONTRACT_FILE
    if not path.exists():
        return None
    contract = Contract.load(path)
    contract.verify_files(folder)
    return contract


def _placement(
    config: ModelConfig, settings: Settings, cores: CpuBudget, look: Callable[[], Devices] | None
) -> Placement:
    """Small networks run on one thread: several runs at once make better use of cores than one that is split."""
    shared = settings.intra_op_threads
    if shared > 1:
        if config.intra_op_threads not in (None, shared):
            raise ConfigError(
                f"{config.where('intra_op_threads')}: expected {shared} or nothing, got {config.intra_op_threads}: the "
                f"server is configured to share one pool of {shared} threads among its models"
            )
        threads, why = shared, "one pool for all models, as configured"
    elif config.intra_op_threads or shared:
        threads, why = config.intra_op_threads or shared, "as configured"
    else:
        threads, why = 1, cores.why
    try:
        placement = place(config.provider or settings.provider, threads, why, shared > 1, look)
    except SettingsError as error:
        if config.provider is None:
            raise
        raise ConfigError(f"{config.where('provider')}: {str(error).removeprefix('provider: ')}") from None
    if not placement.devices:
        return placement
    tf32 = settings.allow_tf32 if config.allow_tf32 is None else config.allow_tf32
    return dataclasses.replace(placement, allow_tf32=tf32, memory_limit=settings.gpu_mem_limit)


def _replay(session: Runnable, contract: Contract) -> str:
    """Run the contract's samples on the provider that will serve. Raises ContractError when an answer is off."""
    outputs = _run_named(session, contract)
    difference = contract.check(outputs)
    return f"contract of {contract.samples.rows} rows holds, largest difference {difference.largest:.2g}"


def _run_named(session: Runnable, contract: Contract) -> dict[str, NDArray[Any]]:
    given = contract.input_arrays()
    places = tuple(range(len(session.signature.outputs)))
    try:
        found = session.run([given[t.name] for t in session.signature.inputs], places)
    except RequestError as error:
        raise ContractError(f"the contract's samples cannot be run: {error}") from None
    return {t.name: a for t, a in zip(session.signature.outputs, found, strict=True)}


def _settled(
    signature: ModelSignature, config: ModelConfig, contract: Contract | None, proof: Proof
) -> tuple[Invariance, str] | None:
    """The verdict and why, where it needs no probe: the operator's word comes first, then the contract's.

    A contract that found rows to depend on each other binds, since it has seen what a probe need not meet. One that
    found them independent is no proof on another provider: it is probed like a network without a contract.
    """
    if config.max_batch_size == 0:
        return Invariance.NONE, "max_batch_size = 0 in the model's options"
    if not signature.batchable:
        return Invariance.NONE, "axis 0 is not a batch of any size"
    mixes = _rows_mix(contract)
    if config.batch_invariance is not None:
        said = f"batch_invariance = {str(config.batch_invariance).lower()} in the model's options, not probed"
        against = ", against rows_independent = false in its contract" if mixes and config.batch_invariance else ""
        return Invariance.ASSERTED if config.batch_invariance else Invariance.DEPENDENT, said + against
    if mixes:
        return Invariance.DEPENDENT, (
            "rows_independent = false in its contract: a row's answer depends on the other rows of a batch; "
            "batch_invariance = true in the model's options would overrule that"
        )
    if proof.flow is RowFlow.MIXES:
        return Invariance.DEPENDENT, (
            f"{proof.why}, so that a row's answer depends on the other rows of a batch; batch_invariance = true in the "
            "model's options would overrule that"
        )
    return None


class _Probes(NamedTuple):
    """The probe of a network, and what it is made with."""

    signature: ModelSignature
    session: Runnable
    samples: Sequence[NDArray[Any]] | None
    rows: int  # of the largest batch
    half: bool
    proof: Proof

    def made(self, shared: SharedMeasurements, shape: Hashable | None, label: str) -> tuple[Invariance, str]:
        """The verdict and why; with fewer runs where the graph is proved and another of the shape was probed."""
        if shape is None or self.proof.flow is not RowFlow.INDEPENDENT:
            return self._full()
        found: list[tuple[Invariance, str]] = []

        def first() -> bool:
            found.append(self._full())
            return found[0][0] is Invariance.EXACT

        exact = shared.exact.get((shape, self.rows, self.half), label, first)
        if found:
            return found[0]
        of = (exact.value, exact.model)
        again = probe_again(self.signature, self._run, self.rows, self.samples, self.half, of)
        return again or self._full()

    def _full(self) -> tuple[Invariance, str]:
        return probe(self.signature, self._run, self.rows, self.samples, self.half, self.proof)

    def _run(self, arrays: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
        return self.session.run(arrays, tuple(range(len(self.signature.outputs))))


def _shape(
    path: Path,
    signature: ModelSignature,
    placement: Placement,
    config: ModelConfig,
    samples: Sequence[NDArray[Any]] | None,
) -> Hashable | None:
    """What networks have in common that take the same time to run; None: nothing can be said of it."""
    network = network_shape(path) if path.suffix != ORT_FORMAT else None
    if network is None:
        return None
    return (
        network,
        dataclasses.replace(placement, why=""),
        (config.graph_optimizations, config.memory_arena, config.memory_pattern),
        tuple((t.name, t.datatype.name, t.shape, t.network_shape) for t in signature.inputs),
        (signature.batchable, signature.default_outputs),
        None if samples is None else tuple((s.dtype.str, s.shape[1:]) for s in samples),
    )


def _rows_mix(contract: Contract | None) -> bool:
    """Whether the exporter found that a row's answer depends on the other rows; not measured is no verdict."""
    return contract is not None and contract.rows_independent is False


def _reservation(invariance: Invariance, why: str, contract: Contract | None) -> str:
    if invariance is Invariance.DEPENDENT:
        return f"served one request at a time: {why}"
    if invariance is Invariance.ASSERTED and _rows_mix(contract):
        return f"answers may depend on the requests that share a run: {why}"
    return ""


def _samples(signature: ModelSignature, contract: Contract | None) -> Sequence[NDArray[Any]] | None:
    if contract is None:
        return None
    given = contract.input_arrays()
    try:
        return in_client_shape(signature.inputs, [given[t.name] for t in signature.inputs])
    except ValueError:  # several rows, where clients send one at a time in a shape without a batch
        return None


def _check_sizes(signature: ModelSignature) -> None:
    """That no tensor is too large to be sent, whatever its other axes. Raises ConfigError."""
    for tensor in (*signature.inputs, *signature.outputs):
        if math.prod(max(size, 1) for size in tensor.shape) > ELEMENT_LIMIT:
            raise ConfigError(f"'{tensor.name}': the sizes of {list(tensor.shape)} are out of range")
