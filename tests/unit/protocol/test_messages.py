"""The wire contract: the same as the public protocol, fresh, and at peace with other packages that register it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2

from forwardpass import protocol

ROOT = Path(__file__).resolve().parents[3]

# What ours has beyond tritonclient's, as (message, field) or (message, None) for a whole message. From MLServer's
# protocol and from later releases of Triton; an unknown field is skipped by a client that does not know it.
EXTRA: set[tuple[str, str | None]] = {
    ("inference.ModelMetadataResponse", "parameters"),
    ("inference.ModelMetadataResponse.ParametersEntry", None),
    ("inference.ModelMetadataResponse.TensorMetadata", "parameters"),
    ("inference.ModelMetadataResponse.TensorMetadata.ParametersEntry", None),
    ("inference.ModelStatistics", "response_stats"),
    ("inference.ModelStatistics.ResponseStatsEntry", None),
    ("inference.InferResponseStatistics", None),
    ("inference.ModelInput", "is_non_linear_format_io"),
    ("inference.ModelOutput", "is_non_linear_format_io"),
    ("inference.ModelConfig", "runtime"),
    ("inference.ModelConfig", "model_metrics"),
    ("inference.ModelMetrics", None),
    ("inference.ModelMetrics.MetricControl", None),
    ("inference.ModelMetrics.MetricControl.MetricIdentifier", None),
    ("inference.ModelMetrics.MetricControl.HistogramOptions", None),
}

type_names = {number: name for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()}

Fields = dict[str, dict[str, tuple[Any, ...]]]


def surface(file: descriptor_pb2.FileDescriptorProto) -> tuple[Fields, Fields, Fields]:
    """Every message's fields, every enum's values and every service's methods, by full name, with all that shows on
    the wire or in text and JSON form."""
    messages: Fields = {}
    enums: Fields = {}
    services: Fields = {}

    def add_enum(prefix: str, enum: descriptor_pb2.EnumDescriptorProto) -> None:
        enums[f"{prefix}.{enum.name}"] = {value.name: (value.number,) for value in enum.value}

    def add_message(prefix: str, message: descriptor_pb2.DescriptorProto) -> None:
        full_name = f"{prefix}.{message.name}"
        messages[full_name] = {
            field.name: (
                field.number,
                type_names[field.type],
                field.type_name,
                field.label,
                field.json_name or json_name(field.name),
                message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None,
                message.options.map_entry,
                field.options.packed if field.options.HasField("packed") else None,
            )
            for field in message.field
        }
        for nested in message.nested_type:
            add_message(full_name, nested)
        for enum in message.enum_type:
            add_enum(full_name, enum)

    for message in file.message_type:
        add_message(file.package, message)
    for enum in file.enum_type:
        add_enum(file.package, enum)
    for service in file.service:
        services[f"{file.package}.{service.name}"] = {
            method.name: (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
            for method in service.method
        }
    return messages, enums, services


def json_name(name: str) -> str:
    """protoc's rule; generated modules leave the name out."""
    head, *tail = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in tail)


def our_file(name: str) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    protocol.POOL.FindFileByName(name).CopyToProto(file)
    return file


def their_file(module: types.ModuleType) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    return file


@pytest.fixture(scope="module")
def triton() -> types.ModuleType:
    return pytest.importorskip("tritonclient.grpc.service_pb2", reason="tritonclient[grpc] is not installed")


@pytest.fixture(scope="module")
def triton_config() -> types.ModuleType:
    return pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")


def differences(ours: Fields, theirs: Fields) -> tuple[dict[str, object], set[tuple[str, str | None]]]:
    """What theirs has and ours lacks or has otherwise; and what ours has beyond theirs."""
    wrong: dict[str, object] = {}
    extra: set[tuple[str, str | None]] = {(name, None) for name in ours.keys() - theirs.keys()}
    for name, fields in theirs.items():
        if name not in ours:
            wrong[name] = "missing"
            continue
        for field, facts in fields.items():
            if ours[name].get(field) != facts:
                wrong[f"{name}.{field}"] = (ours[name].get(field), facts)
        extra |= {(name, field) for field in ours[name].keys() - fields.keys()}
    return wrong, extra


def test_everything_of_the_public_protocol_is_here_and_identical(
    triton: types.ModuleType, triton_config: types.ModuleType
) -> None:
    extra: set[tuple[str, str | None]] = set()
    for name, module in (("grpc_service.proto", triton), ("model_config.proto", triton_config)):
        ours, theirs = surface(our_file(name)), surface(their_file(module))
        assert theirs[0], name
        for our_part, their_part in zip(ours, theirs, strict=True):
            wrong, more = differences(our_part, their_part)
            assert wrong == {}
            extra |= more
    assert extra == EXTRA


def test_health_is_the_standard_service() -> None:
    health = pytest.importorskip("grpc_health.v1.health_pb2", reason="grpcio-health-checking is not installed")
    ours, theirs = surface(our_file("health.proto")), surface(their_file(health))
    for our_part, their_part in zip(ours, theirs, strict=True):
        wrong, _ = differences(our_part, their_part)
        assert wrong == {}


def test_the_shipped_descriptor_set_is_fresh() -> None:
    pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    spec = importlib.util.spec_from_file_location("proto_generate", ROOT / "proto" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.TARGET == ROOT / "server" / "forwardpass" / "protocol" / "schema.binpb"
    assert generate.compile_descriptor_set() == generate.TARGET.read_bytes(), "schema.binpb is stale: run `make proto`"


OURS = "import forwardpass.protocol as ours"
THEIRS = "import tritonclient.grpc as theirs"
USE_BOTH = """
from tritonclient.grpc import service_pb2
assert ours.ModelInferRequest is not service_pb2.ModelInferRequest
sent = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"abcd"])
assert ours.ModelInferRequest.FromString(sent.SerializeToString()).raw_input_contents[0] == b"abcd"
theirs.InferInput("x", [1, 4], "FP32")
"""


@pytest.mark.parametrize("order", [(OURS, THEIRS), (THEIRS, OURS)], ids=["ours-first", "theirs-first"])
def test_lives_in_one_process_with_tritonclient(order: tuple[str, str], triton: types.ModuleType) -> None:
    done = run_python("\n".join([*order, USE_BOTH]))
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    program = f"""
{OURS}
import sys
heavy = {{"grpc", "onnxruntime", "torch", "pydantic", "tritonclient", "grpc_tools"}}
print(sorted(heavy & {{name.partition(".")[0] for name in sys.modules}}))
from google.protobuf import descriptor_pool
for name in ("inference.ModelInferRequest", "google.rpc.Status", "grpc.health.v1.HealthCheckRequest"):
    try:
        descriptor_pool.Default().FindMessageTypeByName(name)
    except KeyError:
        continue
    print(name, "is in the default pool")
"""
    done = run_python(program)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_messages_survive_the_way_to_tritonclient_and_back(triton: types.ModuleType) -> None:
    request = protocol.ModelInferRequest(model_name="scorer", model_version="3", id="a1")
    request.parameters["priority"].uint64_param = 2**64 - 1
    request.parameters["temperature"].double_param = 0.1
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[2, 3])
    tensor.parameters["shared_memory_offset"].int64_param = -1
    typed = request.inputs.add(name="y", datatype="INT8", shape=[2, 1])
    typed.contents.int_contents.extend([-128, 127])
    request.outputs.add(name="z").parameters["classification"].int64_param = 3
    request.raw_input_contents.append(np.arange(6, dtype="<f4").tobytes())

    theirs = triton.ModelInferRequest.FromString(request.SerializeToString())
    assert theirs.parameters["priority"].uint64_param == 2**64 - 1
    assert list(theirs.inputs[1].contents.int_contents) == [-128, 127]
    assert protocol.ModelInferRequest.FromString(theirs.SerializeToString()) == request

    # A field that they do not know passes through them unharmed.
    reply = protocol.ModelMetadataResponse(name="scorer", platform="onnxruntime_onnx")
    reply.parameters["row_independent"].bool_param = True
    known = triton.ModelMetadataResponse.FromString(reply.SerializeToString())
    assert known.name == "scorer"
    assert protocol.ModelMetadataResponse.FromString(known.SerializeToString()) == reply


def test_the_method_tables_name_every_rpc_and_its_classes() -> None:
    infer, stream = protocol.METHODS["ModelInfer"], protocol.METHODS["ModelStreamInfer"]
    assert len(protocol.METHODS) == 20
    assert infer.path == "/inference.GRPCInferenceService/ModelInfer"
    assert (infer.request, infer.response) == (protocol.ModelInferRequest, protocol.ModelInferResponse)
    assert stream.response is protocol.ModelStreamInferResponse
    streaming = {
        name for name, method in protocol.METHODS.items() if method.client_streaming or method.server_streaming
    }
    assert streaming == {"ModelStreamInfer"}
    assert stream.client_streaming and stream.server_streaming
    watch = protocol.HEALTH_METHODS["Watch"]
    assert set(protocol.HEALTH_METHODS) == {"Check", "List", "Watch"}
    assert (watch.path, watch.client_streaming, watch.server_streaming) == ("/grpc.health.v1.Health/Watch", False, True)


def test_each_message_constant_bears_its_own_name() -> None:
    constants = {name: value for name, value in vars(protocol).items() if isinstance(value, type(protocol.RetryInfo))}
    assert {name for name, value in constants.items() if name != value.DESCRIPTOR.name} == {"RpcStatus"}
    for method in [*protocol.METHODS.values(), *protocol.HEALTH_METHODS.values()]:
        for cls in (method.request, method.response):
            assert constants[cls.DESCRIPTOR.name] is cls


def test_an_unknown_message_is_a_key_error() -> None:
    with pytest.raises(KeyError, match=r"inference\.NoSuchThing"):
        protocol.message("inference.NoSuchThing")


def test_retry_info_has_the_bytes_that_grpc_clients_expect() -> None:
    retry = protocol.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    status = protocol.RpcStatus(code=8, message="full")
    status.details.add().Pack(retry)
    # Written out by hand: field << 3 | wire type, then a varint, or a length and the bytes.
    delay = b"\x08\x01" + b"\x10\x80\xca\xb5\xee\x01"  # seconds = 1, nanos = 500_000_000
    info = b"\x0a\x08" + delay  # retry_delay
    url = b"type.googleapis.com/google.rpc.RetryInfo"
    any_ = b"\x0a\x28" + url + b"\x12\x0a" + info  # type_url, value
    assert len(url) == 0x28 and len(info) == 0x0A
    assert status.SerializeToString() == b"\x08\x08" + b"\x12\x04full" + b"\x1a\x36" + any_

    back = protocol.RetryInfo()
    assert status.details[0].Unpack(back)
    assert back.retry_delay.ToMilliseconds() == 1500


def test_the_default_google_rpc_types_read_our_refusal() -> None:
    details = pytest.importorskip("google.rpc.error_details_pb2", reason="googleapis-common-protos is not installed")
    ours = protocol.RetryInfo()
    ours.retry_delay.FromMilliseconds(250)
    assert details.RetryInfo.FromString(ours.SerializeToString()).retry_delay.ToMilliseconds() == 250


def test_the_datatype_table_agrees_with_the_messages() -> None:
    contents = {field.name for field in protocol.InferTensorContents.DESCRIPTOR.fields}
    used = {datatype.contents for datatype in protocol.DATATYPES.values()}
    assert used == contents | {None}
    values = set(protocol.POOL.FindEnumTypeByName("inference.DataType").values_by_name) - {"TYPE_INVALID"}
    assert {datatype.config for datatype in protocol.DATATYPES.values()} == values == set(protocol.BY_CONFIG_TYPE)
    assert len(protocol.BY_ORT_TYPE) == len(protocol.DATATYPES) == 14
    for name, datatype in protocol.DATATYPES.items():
        assert datatype.name == name
        assert protocol.BY_ORT_TYPE[datatype.ort] is datatype
        assert protocol.BY_CONFIG_TYPE[datatype.config] is datatype
        if datatype.numpy is None:
            assert (name, datatype.itemsize) == ("BYTES", 0)
        else:
            assert datatype.itemsize == datatype.numpy.itemsize


def test_datatypes_are_those_of_tritonclient(triton: types.ModuleType) -> None:
    utils = pytest.importorskip("tritonclient.utils", reason="tritonclient[grpc] is not installed")
    for name, datatype in protocol.DATATYPES.items():
        if datatype.numpy is not None and name != "BF16":
            assert np.dtype(utils.triton_to_np_dtype(name)) == datatype.numpy
            assert utils.np_to_triton_dtype(datatype.numpy) == name


def test_onnx_runtime_takes_each_numpy_type_under_the_name_we_give_it() -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for datatype in protocol.DATATYPES.values():
        if datatype.numpy is not None and datatype.name != "BF16":
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((2, 3), datatype.numpy))
            assert protocol.BY_ORT_TYPE[value.data_type()] is datatype
