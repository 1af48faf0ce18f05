"""config.pbtxt: what is supported comes out as it was meant, everything else is refused by name and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format

from forwardpass import protocol
from forwardpass.errors import ConfigError
from forwardpass.model import triton_config, triton_options
from forwardpass.model.options import ModelConfig, QueuePolicy, TensorOptions

# Triton's documented options for an ONNX model, as its manuals write them: lists in brackets and repeated fields,
# with and without colons and commas.
DOCUMENTED = """\
name: "m"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: 8  # rows
default_model_filename: "net.onnx"
input [
  { name: "x" data_type: TYPE_FP32 dims: [ 3, 224 ] format: FORMAT_NONE },
  {
    name: 'ids'
    data_type: TYPE_INT64
    dims: [ -1 ]
    reshape: { shape: [ -1 ] }
  }
]
output { name: "y" data_type: TYPE_FP16 dims: 10 label_filename: "labels.txt" }
output < name: "z" >
version_policy: { latest { num_versions: 2 } }
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  preserve_ordering: true
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 500 max_queue_size: 16 }
  priority_queue_policy {
    key: 1
    value: { allow_timeout_override: true, max_queue_size: 4 }
  }
}
instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_CPU } ]
optimization { graph: { level: 1 } input_pinned_memory { enable: true } }
parameters: { key: "intra_op_thread_count" value: { string_value: "3" } }
parameters: { key: "owner" value: { string_value: "the" ' team' } }
model_warmup {
  name: "zeros"
  batch_size: 4
  count: 2
  inputs { key: "x" value: { data_type: TYPE_FP32 dims: [ 3, 224 ] zero_data: true } }
  inputs { key: "ids" value: { data_type: TYPE_INT64 dims: 5 input_data_file: "ids.raw" } }
}
"""


def load(folder: Path, text: str, name: str | None = "m") -> ModelConfig:
    path = folder / "config.pbtxt"
    path.write_text(text)
    return triton_config.load(path, name)


def test_the_documented_options_come_out_as_they_were_meant(tmp_path: Path) -> None:
    config = load(tmp_path, DOCUMENTED)
    assert config.model_file == "net.onnx"
    assert (config.max_batch_size, config.batching, config.versions) == (8, True, 2)
    assert config.inputs == [
        TensorOptions(name="x", datatype="FP32", dims=[3, 224]),
        TensorOptions(name="ids", datatype="INT64", dims=[-1], reshape=[-1]),
    ]
    assert config.outputs == [
        TensorOptions(name="y", datatype="FP16", dims=[10], labels="labels.txt"),
        TensorOptions(name="z"),
    ]
    assert (config.preferred_batch_sizes, config.max_queue_delay_us) == ([4, 8], 100)
    assert config.preserve_ordering
    assert (config.priority_levels, config.default_priority) == (3, 2)
    by_default = QueuePolicy(timeout_us=500, max_requests=16)
    assert config.queue_policies == {
        1: QueuePolicy(timeout_override=True, max_requests=4),
        2: by_default,
        3: by_default,
    }
    assert (config.provider, config.instances, config.intra_op_threads) == ("cpu", 3, 3)
    assert config.graph_optimizations == "extended"
    assert config.parameters == {"intra_op_thread_count": "3", "owner": "the team"}
    (request,) = config.warm_up
    assert (request.name, request.rows, request.count) == ("zeros", 4, 2)
    assert (request.inputs["x"].data, request.inputs["x"].dims) == ("zero", [3, 224])
    assert (request.inputs["ids"].data, request.inputs["ids"].file) == ("file", "ids.raw")


def test_the_lines_of_options_are_known_for_what_is_found_wrong_later(tmp_path: Path) -> None:
    config = load(tmp_path, DOCUMENTED)
    file = tmp_path / "config.pbtxt"
    assert config.where("max_batch_size") == f"{file}:4: max_batch_size"
    assert config.where("input 'ids'") == f"{file}:8: input 'ids'"
    assert config.where("output 'z'") == f"{file}:16: output 'z'"
    assert config.where("warm_up") == f"{file}:34: model_warmup"
    assert config.where("labels") == f"{file}: labels"  # nothing of the kind is in the file


def test_json_says_the_same_as_text(tmp_path: Path) -> None:
    message = text_format.Parse(DOCUMENTED, protocol.ModelConfig())
    for names in (True, False):
        text = json_format.MessageToJson(message, preserving_proto_field_name=names)
        assert triton_config.from_json(text, "m").model_dump() == load(tmp_path, DOCUMENTED).model_dump()


@pytest.mark.parametrize(
    ("text", "size", "batching"),
    [
        ("", None, True),  # nothing said: completed from the network
        ("max_batch_size: 0", 0, False),
        # Without dynamic_batching requests share no runs, unless Triton would complete the configuration.
        ('max_batch_size: 8 input { name: "x" } output { name: "y" }', 8, False),
        ('max_batch_size: 8 input { name: "x" }', 8, True),
        ("max_batch_size: 8", 8, True),
        ("max_batch_size: 1", 1, False),
        ("max_batch_size: 8 dynamic_batching { }", 8, True),
        ("dynamic_batching { }", None, True),
        ('input { name: "x" }', 0, False),  # shapes were written, without a batch
    ],
)
def test_whether_requests_share_runs(tmp_path: Path, text: str, size: int | None, batching: bool) -> None:
    config = load(tmp_path, text)
    assert (config.max_batch_size, config.batching) == (size, batching)


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        ("", 1),
        ("version_policy { latest { } }", 1),
        ("version_policy: { all: {} }", "all"),
        ("version_policy { specific: { versions: 3 versions: [ 1 ] } }", [3, 1]),
    ],
)
def test_version_policies(tmp_path: Path, text: str, versions: Any) -> None:
    assert load(tmp_path, text).versions == versions


@pytest.mark.parametrize(
    ("text", "provider", "instances"),
    [
        ("instance_group { count: 4 }", None, 4),
        ("instance_group { kind: KIND_CPU }", "cpu", 1),
        ("instance_group { kind: KIND_GPU count: 2 gpus: 1 }", "cuda:1", 2),
        ("instance_group { kind: KIND_GPU }", "cuda", 1),
        ("instance_group { gpus: 3 }", "cuda:3", 1),
        ("instance_group { kind: KIND_GPU count: 2 gpus: [ 1, 0 ] }", "cuda:0,1", 2),
        ("instance_group [ { kind: KIND_GPU gpus: 0 }, { kind: KIND_GPU gpus: 1 } ]", "cuda:0,1", 1),
        ("instance_group [ { gpus: [ 0, 1 ] }, { kind: KIND_GPU count: 2 gpus: [ 0, 1 ] } ]", "cuda:0,1", 3),
    ],
)
def test_where_instances_run(tmp_path: Path, text: str, provider: str | None, instances: int) -> None:
    config = load(tmp_path, text)
    assert (config.provider, config.instances) == (provider, instances)


REFUSED = [
    ("sequence_batching { }", 1, "sequence_batching is not supported: a feedforward network keeps no state"),
    ("\nensemble_scheduling { }", 2, "ensemble_scheduling is not supported"),
    (
        "optimization {\n execution_accelerators {\n  gpu_execution_accelerator : [ {\n name: 'tensorrt' } ] } }",
        3,
        "optimization.execution_accelerators.gpu_execution_accelerator is not supported",
    ),
    ("dynamic_batching {\n default_queue_policy {\n timeout_action: DELAY } }", 3, "expected REJECT, got DELAY"),
    (
        "dynamic_batching { priority_levels: 2 default_priority_level: 1\npriority_queue_policy { key: 1 value { } }\n"
        "priority_queue_policy {\nkey: 2\nvalue {\ntimeout_action: DELAY } } }",
        6,
        "expected REJECT, got DELAY",
    ),
    ("dynamic_batching { priority_levels: 2\n default_priority_level: 3 }", 2, "expected 1 to 2, got 3"),
    ("dynamic_batching {\n priority_levels: 2 }", 2, "default_priority_level: expected 1 to 2, got 0"),
    (
        "dynamic_batching {\n priority_queue_policy {\n key: 1 value { } } }",
        2,
        "expected priorities of 1 to priority_levels, 0, got 1",
    ),
    ("max_batch_size: 0\ndynamic_batching { }", 2, "expected max_batch_size of at least 1 with it, got 0"),
    ("max_batch_size: 4\ndynamic_batching { preferred_batch_size: 8 }", 2, "preferred_batch_size: 8 is more than"),
    ("dynamic_batching {\n max_queue_delay_microseconds: 99000000 }", 2, "max_queue_delay_microseconds: "),
    ("max_batch_size: -1", 1, "max_batch_size: expected at least 0, got -1"),
    ('\nname: "other"', 2, "name: expected 'm', as the folder is called, got 'other'"),
    ('platform: "tensorrt_plan"', 1, "platform: expected 'onnxruntime_onnx', got 'tensorrt_plan'"),
    ('backend: "python"', 1, "backend: expected 'onnxruntime', got 'python'"),
    ('default_model_filename: "../x.onnx"', 1, "default_model_filename: expected the name of a file"),
    ('input {\n name: "x"\n dims: 0 }', 3, "input.dims of 'x': expected sizes of at least 1, or -1 for any, got [0]"),
    (
        'output { name: "y" dims: 2\n reshape { } }',
        2,
        "output.reshape: expected as many elements as in dims, [2], and -1 at most once and in both, got [] of 'y'",
    ),
    ('input { name: "x" }\ninput { name: "x" }', 1, "input: 'x' is named twice"),
    ("input { dims: 4 }", 1, "input: one of them has no name"),
    ("instance_group { kind: KIND_CPU\n gpus: 0 }", 2, "expected devices of KIND_GPU, each once, got [0]"),
    ("instance_group { kind: KIND_GPU\n gpus: [ 1, 1 ] }", 2, "expected devices of KIND_GPU, each once, got [1, 1]"),
    ("instance_group { kind: KIND_CPU }\ninstance_group { kind: KIND_GPU }", 1, "expected one kind for all groups"),
    ("instance_group { kind: KIND_GPU }\ninstance_group { gpus: 1 }", 1, "with devices in each or in none"),
    (
        "instance_group { gpus: [ 0, 1 ] }\ninstance_group { gpus: 1 }",
        1,
        "instance_group: expected as many instances on each device, got {0: 1, 1: 2}",
    ),
    ("instance_group { }\ninstance_group { kind: KIND_MODEL }", 2, "kind: got KIND_MODEL"),
    ("instance_group { count: -1 }", 1, "count: expected at least 0, got -1"),
    ("optimization {\n graph { level: 7 } }", 2, "expected -1 (basic), 0 (all), 1 (extended) or 2 (none), got 7"),
    ("version_policy { specific { } }", 1, "version_policy: "),
    ("version_policy { specific { versions: 0 } }", 1, "got [0]"),
    (
        'parameters { key: "a" value { } }\nparameters { key: "execution_mode" value { string_value: "1" } }',
        2,
        "parameters.execution_mode: expected 0",
    ),
    ('parameters { key: "intra_op_thread_count" value { string_value: "x" } }', 1, "expected a whole number, got 'x'"),
    (
        'parameters { key: "enable_mem_arena" value { string_value: "no" } }',
        1,
        "enable_mem_arena: expected 0 or 1, got",
    ),
    (
        'parameters { key: "memory.enable_memory_arena_shrinkage" value { string_value: "gpu:0" } }',
        1,
        "expected cpu:0; a device's memory is reserved at load, got 'gpu:0'",
    ),
    ('parameters { key: "gpu_mem_limit" value { string_value: "9" } }', 1, "expected nothing: set the server's --gpu"),
    ("model_warmup { batch_size: 1 }", 1, "model_warmup"),
    ('model_warmup { inputs { key: "x" value { data_type: TYPE_FP32 } } }', 1, "expected zero_data, random_data or"),
    ('model_warmup { inputs { key: "x" value { zero_data: true } } }', 1, "expected data_type"),
    (
        'model_warmup { inputs { key: "x" value { data_type: TYPE_FP32 input_data_file: "../../x" } } }',
        1,
        "expected the name of a file",
    ),
    ("\n\nfoo: 1", 3, 'no field named "foo"'),
    ("input { name: 'x'\n bar { } }", 2, 'no field named "bar"'),
    ("name: 'm'\nname: 'm'", 2, 'should not have multiple "name" fields'),
    ("dynamic_batching { }\nsequence_batching { }", 2, "another member of oneof"),
    ("max_batch_size: many", 1, "parse integer"),
    ("input [ { name: 'x' }", 1, 'Expected ","'),
]


@pytest.mark.parametrize(("text", "line", "reason"), REFUSED, ids=[r[2][:50] for r in REFUSED])
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'config.pbtxt'}:{line}:"), caught.value
    assert reason in str(caught.value)


def leaves(descriptor: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every option of the public structure: its path, and text that sets it and nothing else to something."""
    for field in descriptor.fields:
        here = (*path, field.name)
        if field.message_type is None:
            yield here, f"{field.name}: {_something(field)}"
            continue
        kind = field.message_type
        if kind.GetOptions().map_entry:
            key = '"k"' if kind.fields_by_name["key"].type == 9 else "1"
            value = kind.fields_by_name["value"]
            if value.message_type is None:
                yield here, f"{field.name} {{ key: {key} value: {_something(value)} }}"
            else:
                for inner, text in leaves(value.message_type, here):
                    yield inner, f"{field.name} {{ key: {key} value {{\n{text} }} }}"
            continue
        if not kind.fields:
            yield here, f"{field.name} {{ }}"
        for inner, text in leaves(kind, here):
            yield inner, f"{field.name} {{\n{text} }}"


def _something(field: Any) -> str:
    """A value that is not the one that stands for nothing."""
    if field.enum_type is not None:
        return str(field.enum_type.values[-1].name)
    return {9: '"1"', 8: "true", 2: "1.5"}.get(field.type, "1")


OPTIONS = dict(leaves(protocol.ModelConfig.DESCRIPTOR))


def test_the_walk_over_the_options_sees_them_all() -> None:
    assert len(OPTIONS) == 123
    assert ("optimization", "cuda", "graph_spec", "graph_lower_bound", "input", "dim") in OPTIONS
    assert ("model_warmup", "inputs", "random_data") in OPTIONS


@pytest.mark.parametrize("path", OPTIONS, ids=".".join)
def test_no_option_is_silently_ignored(tmp_path: Path, path: tuple[str, ...]) -> None:
    """Each option, set alone: it is in the table of what is acted on, or it is refused by name and line."""
    text = OPTIONS[path]
    name = ".".join(path)
    known = name in triton_options.SUPPORTED or name in triton_options.NO_EFFECT
    try:
        load(tmp_path, text)
    except ConfigError as error:
        said = str(error)
    else:
        assert known, f"{text!r} was taken without a word"
        return
    if not known:
        above = (".".join(path[:n]) for n in range(1, len(path) + 1))
        assert any(f" {at} is not supported" in said for at in above), said
    assert said.startswith(f"{tmp_path / 'config.pbtxt'}:"), said
    assert said.partition("config.pbtxt:")[2].partition(":")[0].isdecimal(), said


def test_every_path_in_the_tables_is_one_of_the_structure() -> None:
    prefixes = {".".join(path[:n]) for path in OPTIONS for n in range(1, len(path) + 1)}
    assert prefixes >= triton_options.SUPPORTED
    assert triton_options.NO_EFFECT.keys() <= prefixes
    assert all(any(p.startswith(start) for p in prefixes) for start in triton_options.BECAUSE)


def test_the_text_that_tritons_own_answer_gives_is_accepted(tmp_path: Path) -> None:
    # What Triton's ModelConfig says of an ONNX model: every default is spelled out.
    said = {
        "name": "m",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 8,
        "input": [
            {
                "name": "x",
                "data_type": "TYPE_FP32",
                "format": "FORMAT_NONE",
                "dims": [4],
                "is_shape_tensor": False,
                "allow_ragged_batch": False,
                "optional": False,
            }
        ],
        "output": [
            {"name": "y", "data_type": "TYPE_FP32", "dims": [3], "label_filename": "", "is_shape_tensor": False}
        ],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            "priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            "gather_kernel_buffer_threshold": 0,
            "eager_batching": False,
        },
        "instance_group": [
            {
                "name": "m",
                "kind": "KIND_CPU",
                "count": 2,
                "gpus": [],
                "secondary_devices": [],
                "profile": [],
                "passive": False,
                "host_policy": "",
            }
        ],
        "default_model_filename": "model.onnx",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
        "model_transaction_policy": {"decoupled": False},
    }
    config = triton_config.from_json(json.dumps(said), "m")
    assert (config.max_batch_size, config.batching, config.instances) == (8, False, 2)
    text = text_format.MessageToString(json_format.ParseDict(said, protocol.ModelConfig()))
    assert load(tmp_path, text).model_dump() == config.model_dump()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "expected an object"),
        ("null", "expected an object"),
        ("{", "not a ModelConfig as JSON"),
        ('{"max_batch_size": "many"}', "max_batch_size"),
        ('{"nothing": 1}', 'no field named "nothing"'),
        ('{"sequence_batching": {}}', "config: sequence_batching is not supported"),
        ('{"name": "other"}', "config: name: expected 'm'"),
    ],
)
def test_bad_json_is_told(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"^config: ") as caught:
        triton_config.from_json(text, "m")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        triton_config.load(tmp_path / "config.pbtxt", "m")
    (tmp_path / "config.pbtxt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        triton_config.load(tmp_path / "config.pbtxt", "m")
    assert triton_config.model_name(tmp_path / "config.pbtxt") == ""


def test_the_name_is_free_where_the_folder_has_none_to_give(tmp_path: Path) -> None:
    assert load(tmp_path, 'name: "anything"', None).max_batch_size is None
    assert triton_config.model_name(tmp_path / "config.pbtxt") == "anything"
