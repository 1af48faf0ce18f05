"""Which options of Triton's config.pbtxt are acted on, accepted, or refused and why; and the walk that finds others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from forwardpass.model.pbtxt_lines import TextNode

# Supported options, by the message that contains them; entries of a list or a map have its path.
_ACTED_ON = {
    "": (
        "name",
        "platform",
        "backend",
        "runtime",
        "max_batch_size",
        "default_model_filename",
        "parameters",
        "instance_group",
    ),
    "parameters.": ("string_value",),
    "input.": ("name", "data_type", "dims", "reshape.shape", "optional"),
    "output.": ("name", "data_type", "dims", "reshape.shape", "label_filename"),
    "version_policy.": ("latest", "latest.num_versions", "all", "specific", "specific.versions"),
    "dynamic_batching": ("",),
    "dynamic_batching.": (
        "preferred_batch_size",
        "max_queue_delay_microseconds",
        "preserve_ordering",
        "priority_levels",
        "default_priority_level",
        "priority_queue_policy",
    ),
    "dynamic_batching.default_queue_policy.": (
        "default_timeout_microseconds",
        "allow_timeout_override",
        "max_queue_size",
    ),
    "dynamic_batching.priority_queue_policy.": (
        "default_timeout_microseconds",
        "allow_timeout_override",
        "max_queue_size",
    ),
    "instance_group.": ("count", "kind", "gpus"),
    "optimization.": ("graph.level",),
    "model_warmup": ("",),
    "model_warmup.": ("name", "batch_size", "count", "inputs"),
    "model_warmup.inputs.": ("data_type", "dims", "zero_data", "random_data", "input_data_file"),
}
SUPPORTED = frozenset(prefix + name for prefix, names in _ACTED_ON.items() for name in names)
# Options that are accepted although they have no effect here, and why.
NO_EFFECT = {
    "input": "entries are looked at field by field",
    "output": "entries are looked at field by field",
    "input.format": "describes to clients how an image lies in the tensor; shown in ModelConfig",
    "instance_group.name": "a label",
    "optimization.input_pinned_memory.enable": "on the CPU the network reads the request's memory",
    "optimization.output_pinned_memory.enable": "on the CPU the answer is sent from the network's memory",
    "dynamic_batching.default_queue_policy.timeout_action": "the one other action, DELAY, is refused below",
    "dynamic_batching.priority_queue_policy.timeout_action": "the one other action, DELAY, is refused below",
}
# Why other options are not supported, if there is a specific reason; by the start of the path.
BECAUSE = {
    "sequence_batching": "a feedforward network keeps no state between requests",
    "ensemble_scheduling": "models are served one by one; merge the networks, or call one after the other",
    "optimization.execution_accelerators": "the network runs on ONNX Runtime's CPU or CUDA provider",
    "model_transaction_policy.decoupled": "every request gets exactly one answer",
    "input.allow_ragged_batch": "rows of one matrix have one shape",
    "cc_model_filenames": "one file serves every device; name it in default_model_filename",
    "response_cache": "there is no cache of answers",
    "model_metrics": "the buckets of histograms are the server's own",
    "model_operations": "only ONNX Runtime's own operators are known",
}
# Options that change no answer, only how quick a model is or what is reported of it, by the start of the path: what
# --ignore-unsupported serves without.
SLOWER_WITHOUT = (
    "optimization.", "response_cache", "model_metrics", "metric_tags", "instance_group.rate_limiter",
    "instance_group.profile", "instance_group.secondary_devices", "instance_group.host_policy", "cc_model_filenames",
)  # fmt: skip


def unsupported(message: Any, node: TextNode | None, prefix: str) -> Iterator[tuple[str, TextNode | None]]:
    """Path and node of every option that is set and not supported."""
    for field, value in message.ListFields():
        path = prefix + field.name
        known = path in SUPPORTED or path in NO_EFFECT
        if field.message_type is None:
            if not known:
                yield path, child(node, field.name)
        elif field.message_type.GetOptions().map_entry:
            for key in value:
                entry = child(node, field.name, str(key))
                if not known:
                    yield path, entry
                elif field.message_type.fields_by_name["value"].message_type is not None:
                    yield from unsupported(value[key], child(entry, "value") or entry, path + ".")
        elif hasattr(value, "add"):
            for i, item in enumerate(value):
                entry = child(node, field.name, i)
                if known:
                    yield from unsupported(item, entry, path + ".")
                else:
                    yield path, entry
        elif field.containing_oneof is not None and not known:
            yield path, child(node, field.name)  # selecting it counts as setting it, even if it is empty
        else:
            yield from unsupported(value, child(node, field.name), path + ".")


def child(node: TextNode | None, name: str, place: int | str = 0) -> TextNode | None:
    return None if node is None else node.child(name, place)
