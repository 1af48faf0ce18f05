"""The wire contract as Python objects: message classes and method tables.

All are read from `schema.binpb`, the compiled proto/*.proto, into our own descriptor pool: other packages
(tritonclient, kserve, mlserver) register the same names in protobuf's default pool, which holds each name once.
No I/O except that one file, no gRPC library, nothing about any model.

A class from here and one of another package with the same full name are different types: exchange bytes, not objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INFERENCE_SERVICE: Final = "inference.GRPCInferenceService"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICE: Final = "grpc.reflection.v1.ServerReflection"

# The classes are made at run time, so their fields are invisible to type checkers.
MessageClass = type[Any]


def _load_pool() -> descriptor_pool.DescriptorPool:
    data = resources.files(__package__).joinpath("schema.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:  # each after its imports
        pool.AddSerializedFile(file.SerializeToString())
    return pool


# Holds `inference`, `grpc.health.v1`, `grpc.reflection.v1`, `google.rpc` and the google.protobuf types they use. Server
# reflection reads it.
POOL: Final = _load_pool()


def message(full_name: str) -> MessageClass:
    """The class of a message by its full name ("inference.ModelInferRequest"). Raises KeyError if there is none."""
    cls: MessageClass = message_factory.GetMessageClass(POOL.FindMessageTypeByName(full_name))
    return cls


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its name, and its request and response types."""

    service: str  # full name: "inference.GRPCInferenceService"
    name: str  # "ModelInfer"
    request: MessageClass
    response: MessageClass
    client_streaming: bool
    server_streaming: bool

    @property
    def path(self) -> str:
        """The method's :path in HTTP/2: "/inference.GRPCInferenceService/ModelInfer"."""
        return f"/{self.service}/{self.name}"


def _methods(service: str) -> Mapping[str, Method]:
    found = {}
    for method in POOL.FindServiceByName(service).methods:
        found[method.name] = Method(
            service=service,
            name=method.name,
            request=message_factory.GetMessageClass(method.input_type),
            response=message_factory.GetMessageClass(method.output_type),
            client_streaming=method.client_streaming,
            server_streaming=method.server_streaming,
        )
    return MappingProxyType(found)


# By short name, in the order of the .proto file.
METHODS: Final = _methods(INFERENCE_SERVICE)
HEALTH_METHODS: Final = _methods(HEALTH_SERVICE)

ServerLiveRequest = message("inference.ServerLiveRequest")
ServerLiveResponse = message("inference.ServerLiveResponse")
ServerReadyRequest = message("inference.ServerReadyRequest")
ServerReadyResponse = message("inference.ServerReadyResponse")
ModelReadyRequest = message("inference.ModelReadyRequest")
ModelReadyResponse = message("inference.ModelReadyResponse")
ServerMetadataRequest = message("inference.ServerMetadataRequest")
ServerMetadataResponse = message("inference.ServerMetadataResponse")
ModelMetadataRequest = message("inference.ModelMetadataRequest")
ModelMetadataResponse = message("inference.ModelMetadataResponse")

InferParameter = message("inference.InferParameter")
InferTensorContents = message("inference.InferTensorContents")
ModelInferRequest = message("inference.ModelInferRequest")
ModelInferResponse = message("inference.ModelInferResponse")
ModelStreamInferResponse = message("inference.ModelStreamInferResponse")

ModelConfig = message("inference.ModelConfig")
ModelConfigRequest = message("inference.ModelConfigRequest")
ModelConfigResponse = message("inference.ModelConfigResponse")
StatisticDuration = message("inference.StatisticDuration")
InferStatistics = message("inference.InferStatistics")
InferBatchStatistics = message("inference.InferBatchStatistics")
ModelStatistics = message("inference.ModelStatistics")
ModelStatisticsRequest = message("inference.ModelStatisticsRequest")
ModelStatisticsResponse = message("inference.ModelStatisticsResponse")

ModelRepositoryParameter = message("inference.ModelRepositoryParameter")
RepositoryIndexRequest = message("inference.RepositoryIndexRequest")
RepositoryIndexResponse = message("inference.RepositoryIndexResponse")
RepositoryModelLoadRequest = message("inference.RepositoryModelLoadRequest")
RepositoryModelLoadResponse = message("inference.RepositoryModelLoadResponse")
RepositoryModelUnloadRequest = message("inference.RepositoryModelUnloadRequest")
RepositoryModelUnloadResponse = message("inference.RepositoryModelUnloadResponse")

SystemSharedMemoryStatusRequest = message("inference.SystemSharedMemoryStatusRequest")
SystemSharedMemoryStatusResponse = message("inference.SystemSharedMemoryStatusResponse")
SystemSharedMemoryRegisterRequest = message("inference.SystemSharedMemoryRegisterRequest")
SystemSharedMemoryRegisterResponse = message("inference.SystemSharedMemoryRegisterResponse")
SystemSharedMemoryUnregisterRequest = message("inference.SystemSharedMemoryUnregisterRequest")
SystemSharedMemoryUnregisterResponse = message("inference.SystemSharedMemoryUnregisterResponse")
CudaSharedMemoryStatusRequest = message("inference.CudaSharedMemoryStatusRequest")
CudaSharedMemoryStatusResponse = message("inference.CudaSharedMemoryStatusResponse")
CudaSharedMemoryRegisterRequest = message("inference.CudaSharedMemoryRegisterRequest")
CudaSharedMemoryRegisterResponse = message("inference.CudaSharedMemoryRegisterResponse")
CudaSharedMemoryUnregisterRequest = message("inference.CudaSharedMemoryUnregisterRequest")
CudaSharedMemoryUnregisterResponse = message("inference.CudaSharedMemoryUnregisterResponse")

TraceSettingRequest = message("inference.TraceSettingRequest")
TraceSettingResponse = message("inference.TraceSettingResponse")
LogSettingsRequest = message("inference.LogSettingsRequest")
LogSettingsResponse = message("inference.LogSettingsResponse")

HealthCheckRequest = message("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = message("grpc.health.v1.HealthCheckResponse")
HealthListRequest = message("grpc.health.v1.HealthListRequest")
HealthListResponse = message("grpc.health.v1.HealthListResponse")

ServerReflectionRequest = message("grpc.reflection.v1.ServerReflectionRequest")
ServerReflectionResponse = message("grpc.reflection.v1.ServerReflectionResponse")

# Serialized into the trailing metadata key `grpc-status-details-bin`. RpcStatus.details takes the Any of this pool:
# `RpcStatus().details.add().Pack(RetryInfo(...))`.
RpcStatus = message("google.rpc.Status")
RetryInfo = message("google.rpc.RetryInfo")
