"""Server reflection: the services offered and the descriptors of their messages, for tools without .proto files.

Uses the same descriptors that the messages are made from. No gRPC, no I/O: a request message in, a response out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2

from forwardpass import protocol
from forwardpass.errors import Status, printable

# Tools may use either name. The messages of both are the same on the wire.
SERVICES = (protocol.REFLECTION_SERVICE, "grpc.reflection.v1alpha.ServerReflection")
METHOD = "ServerReflectionInfo"


class Reflection:
    """`services`: full names of the services offered."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = tuple(services)

    def answer(self, request: Any) -> Any:
        """Return a ServerReflectionResponse. An unknown name is an error within it, not of the call."""
        response = protocol.ServerReflectionResponse(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            response.list_services_response.SetInParent()
            for name in self._services:
                response.list_services_response.service.add(name=name)
            return response
        try:
            if kind == "file_by_filename":
                found = protocol.POOL.FindFileByName(request.file_by_filename)
            elif kind == "file_containing_symbol":
                found = protocol.POOL.FindFileContainingSymbol(request.file_containing_symbol)
            elif kind == "all_extension_numbers_of_type":  # proto3: no message here has any
                name = protocol.POOL.FindMessageTypeByName(request.all_extension_numbers_of_type).full_name
                response.all_extension_numbers_response.base_type_name = name
                return response
            else:
                raise KeyError(kind)
        except KeyError:
            response.error_response.error_code = int(Status.NOT_FOUND)
            response.error_response.error_message = printable(f"not found: {kind} {getattr(request, kind or '', '')!s}")
            return response
        response.file_descriptor_response.file_descriptor_proto.extend(_with_imports(found))
        return response


def _with_imports(file: Any) -> list[bytes]:
    """A file's descriptor and those of all its imports, each once."""
    found: dict[str, bytes] = {}
    left = [file]
    while left:
        one = left.pop()
        if one.name not in found:
            plain = descriptor_pb2.FileDescriptorProto()
            one.CopyToProto(plain)
            found[one.name] = plain.SerializeToString()
            left.extend(one.dependencies)
    return list(found.values())
