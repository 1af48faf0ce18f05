"""A loaded model's options as the protocol's ModelConfig: the given ones, completed by the effective ones. Pure.

Where the two differ the effective ones count: a model that asked for batching and whose rows turned out to depend on
each other is shown without it.
"""

from __future__ import annotations

from typing import Any

from forwardpass import protocol
from forwardpass.model import runtime_parameters
from forwardpass.model.options import ModelConfig
from forwardpass.model.signature import TensorSpec
from forwardpass.model.triton_config import BACKEND, GRAPH_LEVELS, PLATFORM
from forwardpass.repository.loader import LoadedModel

_INPUT, _OUTPUT = protocol.message("inference.ModelInput"), protocol.message("inference.ModelOutput")


def describe(loaded: LoadedModel) -> Any:
    """An inference.ModelConfig with every choice filled in."""
    config, worker = loaded.config, loaded.worker
    message = protocol.ModelConfig()
    if config.origin.given is not None:
        message.CopyFrom(config.origin.given)
    message.name, message.platform, message.backend = worker.name, PLATFORM, BACKEND
    message.default_model_filename = config.model_file
    message.max_batch_size = rows = _largest(loaded)
    _versions(message.version_policy, config)
    _tensors(message, loaded, bool(rows))
    if loaded.batches:
        _batching(message.dynamic_batching, loaded)
    else:
        message.ClearField("dynamic_batching")
    del message.instance_group[:]
    devices = loaded.placement.devices
    group = message.instance_group.add(name=worker.name, count=worker.options.instances // max(1, len(devices)))
    group.kind = type(group).KIND_GPU if devices else type(group).KIND_CPU
    group.gpus[:] = devices
    if config.graph_optimizations != "all":
        message.optimization.graph.level = GRAPH_LEVELS[config.graph_optimizations]
    for key, text in config.parameters.items():
        message.parameters[key].string_value = text
    for key, value in runtime_parameters.of_memory(config).items():
        message.parameters[key].string_value = value
    if loaded.reservation:
        message.parameters["batch_invariance"].string_value = loaded.reservation
    _warm_up(message, config)
    return message


def _largest(loaded: LoadedModel) -> int:
    """Rows of the largest run; 0 if axis 0 is no batch. Rows that depend on each other are run as they arrive."""
    if not loaded.worker.signature.batchable:
        return 0
    return loaded.max_batch_size or loaded.config.max_batch_size or 1


def _versions(policy: Any, config: ModelConfig) -> None:
    if config.versions == "all":
        policy.all.SetInParent()
    elif isinstance(config.versions, int):
        policy.latest.num_versions = config.versions
    else:
        policy.specific.versions[:] = config.versions


def _tensors(message: Any, loaded: LoadedModel, in_rows: bool) -> None:
    """Inputs and outputs as served, with the other options given for them. Hidden outputs are in the metadata only."""
    signature, config = loaded.worker.signature, loaded.config
    answered = [signature.outputs[place] for place in signature.default_outputs]
    labels = {o.name: o.labels or "" for o in config.outputs}
    for field, kind, tensors in (
        (message.input, _INPUT, signature.inputs),
        (message.output, _OUTPUT, answered),
    ):
        given = {entry.name: entry for entry in field}
        entries = [_tensor(t, given.get(t.name), in_rows, kind) for t in tensors]
        del field[:]
        field.extend(entries)
    for entry, tensor in zip(message.output, answered, strict=True):
        if tensor.labels and not entry.label_filename:
            entry.label_filename = labels.get(tensor.name) or config.labels or ""


def _tensor(tensor: TensorSpec, given: Any, in_rows: bool, kind: Any) -> Any:
    entry = kind()
    if given is not None:
        entry.CopyFrom(given)
    entry.name = tensor.name
    entry.data_type = _number_of(tensor.datatype.config)
    entry.dims[:] = tensor.shape[1:] if in_rows else tensor.shape
    entry.ClearField("reshape")
    if tensor.network_shape is not None:
        entry.reshape.SetInParent()
        entry.reshape.shape[:] = tensor.network_shape[1:] if in_rows else tensor.network_shape
    return entry


def _number_of(data_type: str) -> int:
    """The number of a value of inference.DataType, by its name."""
    return int(protocol.POOL.FindEnumTypeByName("inference.DataType").values_by_name[data_type].number)


def _batching(batching: Any, loaded: LoadedModel) -> None:
    options, config = loaded.worker.options, loaded.config
    batching.SetInParent()
    batching.preferred_batch_size[:] = config.preferred_batch_sizes
    batching.max_queue_delay_microseconds = config.max_queue_delay_us
    batching.preserve_ordering = config.preserve_ordering
    if options.priority_levels > 1:
        batching.priority_levels, batching.default_priority_level = options.priority_levels, options.default_priority
    policy = batching.default_queue_policy
    if config.origin.given is None:
        policy.max_queue_size = config.max_queue_requests
        policy.default_timeout_microseconds = config.default_timeout_us
        policy.allow_timeout_override = True
        for priority, own in config.queue_policies.items():
            entry = batching.priority_queue_policy[priority]
            entry.max_queue_size, entry.allow_timeout_override = own.max_requests, own.timeout_override
            entry.default_timeout_microseconds = own.timeout_us


def _warm_up(message: Any, config: ModelConfig) -> None:
    del message.model_warmup[:]
    for request in config.warm_up:
        entry = message.model_warmup.add(name=request.name, batch_size=request.rows, count=request.count)
        for name, given in request.inputs.items():
            made = entry.inputs[name]
            made.data_type = _number_of(protocol.DATATYPES[given.datatype].config)
            made.dims[:] = given.dims
            if given.data == "file":
                made.input_data_file = given.file
            else:
                setattr(made, f"{given.data}_data", True)
