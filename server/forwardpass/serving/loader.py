"""One model version from its folder to a worker that is ready: verify, open, replay, probe, warm. No requests yet.

Every step can refuse, with a ModelError that says why; nothing that was opened is then kept.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.contract import CONTRACT_FILE, MODEL_FILE, Contract
from forwardpass.errors import ConfigError, ContractError, ModelError, RequestError
from forwardpass.serving.admission import Admission
from forwardpass.serving.interface import Interface
from forwardpass.serving.invariance import Invariance, example, probe
from forwardpass.serving.metrics import ModelMetrics
from forwardpass.serving.model_config import ModelConfig
from forwardpass.serving.request import Limits
from forwardpass.serving.run_time import RunTime
from forwardpass.serving.session import Placement, Session, place
from forwardpass.serving.threads import Cores
from forwardpass.serving.worker import Options, Worker
from forwardpass.settings import Settings

logger = logging.getLogger(__name__)

WARM_UP_SECONDS = 0.5  # a model's warm-up stops after this, however slow a run is; every size runs at least once
WARM_UP_RUNS = 5
LARGE_RUN = 4e-3  # seconds of a full batch, from which on a model gets an instance for each core


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A worker, not yet started, and what is known of it: for the start-up report and the model's metadata."""

    worker: Worker
    placement: Placement
    invariance: Invariance
    why: str
    contract: Contract | None
    seconds: float  # that loading took


def options_folder(folder: Path, settings: Settings) -> Path:
    """Where the options and labels of the version in `folder` are: one above it, unless it is all of the repository."""
    return folder if folder == settings.repository else folder.parent


def load(
    name: str,
    version: str,
    folder: Path,
    config: ModelConfig,
    settings: Settings,
    cores: Cores,
    admission: Admission,
) -> Loaded:
    """Load the version in `folder` of the model `name`. Raises ModelError; may take seconds."""
    began = time.monotonic()
    contract = _contract(folder)
    placement = _placement(config, settings, cores)
    session = Session(folder / MODEL_FILE, placement)
    interface = _interface(session.interface, config, contract, options_folder(folder, settings))
    replayed = _replay(session, contract) if contract is not None else ""
    wanted = config.max_batch_size if config.max_batch_size is not None else settings.max_batch_size
    invariance, why = _invariance(interface, session, config, contract, wanted)
    batches = invariance.batches and wanted > 0
    if invariance is Invariance.NONE:
        interface = dataclasses.replace(interface, batchable=False)  # axis 0 is like any other from here on
    limits = Limits(
        max_batch_rows=wanted if batches else 1,
        rows=config.max_queue_rows,
        requests=config.max_queue_requests,
        nbytes=config.max_queue_bytes,
        delay=config.max_queue_delay_us * 1e-6 if batches else 0.0,
        preferred=tuple(config.preferred_batch_sizes),
        deadlines=config.deadline_scheduling,
    )
    run_time = RunTime()
    _warm_up(interface, session, limits.max_batch_rows, run_time, contract)
    instances, reason = _instances(config, settings, cores, placement, run_time.predict(limits.max_batch_rows))
    placement = dataclasses.replace(placement, why=f"{placement.why}; {reason}")
    options = Options(
        limits=limits,
        instances=instances,
        row_independent=batches,
        max_request_rows=config.max_request_rows,
        priority_levels=config.priority_levels,
        default_priority=config.default_priority,
        default_timeout=config.default_timeout_us * 1e-6 if config.default_timeout_us else float("inf"),
        inline_run_limit=settings.inline_run_limit,
    )
    worker = Worker(name, version, session, interface, options, run_time, ModelMetrics(name, version), admission)
    if invariance is Invariance.DEPENDENT:
        logger.warning("model %s version %s is served one request at a time: %s", name, version, why)
    return Loaded(
        worker, placement, invariance, "; ".join(filter(None, (why, replayed))), contract, time.monotonic() - began
    )


def _contract(folder: Path) -> Contract | None:
    if not (folder / MODEL_FILE).is_file():
        raise ModelError(f"{folder}: there is no {MODEL_FILE}")
    path = folder / CONTRACT_FILE
    if not path.exists():
        return None
    contract = Contract.load(path)
    contract.verify_files(folder)
    return contract


def _placement(config: ModelConfig, settings: Settings, cores: Cores) -> Placement:
    """Small networks run on one thread: several runs at once make better use of cores than one that is split."""
    wanted = config.provider or settings.provider
    shared = settings.intra_op_threads
    if shared > 1:
        if config.intra_op_threads not in (None, shared):
            raise ConfigError(
                f"intra_op_threads: expected {shared} or nothing, got {config.intra_op_threads}: the server was told "
                f"to share one pool of {shared} threads among its models"
            )
        return place(wanted, shared, "one pool for all models, as configured", shared=True)
    if config.intra_op_threads or shared:
        return place(wanted, config.intra_op_threads or shared, "as configured")
    return place(wanted, 1, cores.why)


def _instances(
    config: ModelConfig, settings: Settings, cores: Cores, placement: Placement, run: float
) -> tuple[int, str]:
    """How many runs of a model at once, and why. `run`: seconds of a full batch.

    A small network is outrun by the transport: one instance, run where its requests are received, is the quickest. A
    large one is worth every core, each with a run of its own.
    """
    told = config.instances or settings.instances
    if told:
        return told, f"{told} instance(s) as configured"
    if run < LARGE_RUN or placement.threads > 1 or cores.count == 1:
        return 1, "one instance outruns the transport"
    return cores.count, f"an instance for each core, since a full batch takes {run * 1e3:.1f} ms"


def _interface(found: Interface, config: ModelConfig, contract: Contract | None, home: Path) -> Interface:
    """What the file declares, with the labels that the contract or the model's options know."""
    labels: dict[str, tuple[str, ...]] = {}
    hidden: frozenset[str] = frozenset()
    batchable = found.batchable
    if contract is not None:
        _agree(found, contract)
        labels = {t.name: tuple(t.labels) for t in contract.outputs if t.labels}
        hidden = frozenset(t.name for t in contract.hidden)
        batchable = batchable and contract.batchable
    if config.labels is not None:
        named = _labels(home / config.labels)
        labels.update({t.name: named for t in found.outputs if t.shape and t.shape[-1] in (-1, len(named))})
    outputs = tuple(dataclasses.replace(t, labels=labels.get(t.name, ())) for t in found.outputs)
    return Interface(found.inputs, outputs, batchable, hidden)


def _agree(found: Interface, contract: Contract) -> None:
    """The contract speaks of the tensors that the file has."""
    for what, have, want in (
        ("inputs", found.inputs, contract.inputs),
        ("outputs", found.outputs, [*contract.outputs, *contract.hidden]),
    ):
        names, wanted = sorted(t.name for t in have), sorted(t.name for t in want)
        if names != wanted:
            raise ContractError(f"the contract's {what} are {', '.join(wanted)}, the network's are {', '.join(names)}")


def _labels(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"labels: {path} cannot be read: {error}") from None


def _replay(session: Session, contract: Contract) -> str:
    """Run the contract's samples on the provider that will serve. Raises ContractError when an answer is off."""
    outputs = _run_named(session, contract)
    difference = contract.check(outputs)
    return f"contract of {contract.samples.rows} rows holds, largest difference {difference.largest:.2g}"


def _run_named(session: Session, contract: Contract) -> dict[str, NDArray[Any]]:
    given = contract.input_arrays()
    places = tuple(range(len(session.interface.outputs)))
    try:
        found = session.run([given[t.name] for t in session.interface.inputs], places)
    except RequestError as error:
        raise ContractError(f"the contract's samples cannot be run: {error}") from None
    return {t.name: a for t, a in zip(session.interface.outputs, found, strict=True)}


def _invariance(
    interface: Interface, session: Session, config: ModelConfig, contract: Contract | None, wanted: int
) -> tuple[Invariance, str]:
    if not interface.batchable:
        return Invariance.NONE, "axis 0 is not a batch of any size"
    if config.batch_invariance is not None:
        verdict = Invariance.ASSERTED if config.batch_invariance else Invariance.DEPENDENT
        return verdict, f"batch_invariance = {str(config.batch_invariance).lower()} in the model's options, not probed"
    if wanted == 0:
        return Invariance.NONE, "max_batch_size = 0 in the model's options"
    samples = _samples(interface, contract)
    places = tuple(range(len(interface.outputs)))
    return probe(interface, lambda arrays: session.run(arrays, places), max(wanted, 8), samples)


def _samples(interface: Interface, contract: Contract | None) -> Sequence[NDArray[Any]] | None:
    if contract is None:
        return None
    given = contract.input_arrays()
    return [given[t.name] for t in interface.inputs]


def _warm_up(
    interface: Interface, session: Session, largest: int, run_time: RunTime, contract: Contract | None
) -> None:
    """Run every size that matters: it fills caches and arenas, and tells the run-time model where to start."""
    rng = np.random.default_rng(0)
    samples = _samples(interface, contract)
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, sizes[-1] * 2))
    began = time.monotonic()
    for size in sizes:
        if samples is not None:
            arrays = [np.resize(s, (size, *s.shape[1:])) if interface.batchable else s for s in samples]
        else:
            arrays = [example(t, size if interface.batchable else _first(t.shape), rng) for t in interface.inputs]
        for i in range(WARM_UP_RUNS):
            start = time.monotonic()
            try:
                session.run(arrays, interface.default_outputs)
            except RequestError as error:
                logger.info("warm-up with made-up values of %d rows failed: %s", size, error)
                break
            ended = time.monotonic()
            if i:  # the first run allocates
                run_time.observe(size, ended - start)
            if ended - began > WARM_UP_SECONDS:
                break


def _first(shape: tuple[int, ...]) -> int:
    """Size of axis 0 of a made-up input; 1 where any goes."""
    return shape[0] if shape and shape[0] >= 0 else 1
