"""Compile proto/*.proto to the one descriptor set that the package ships (`make proto`).

The result holds no comments and no file options, so that it depends on the contract alone and not on which release of
protoc's bundled google/protobuf/*.proto was at hand. Needs grpcio-tools; the installed package does not.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import resources
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

SOURCES = ("model_config.proto", "grpc_service.proto", "health.proto", "reflection.proto", "error_details.proto")
HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "server" / "forwardpass" / "protocol" / "schema.binpb"


def compile_descriptor_set() -> bytes:
    """Return the serialised FileDescriptorSet, every file after those it imports. RuntimeError if protoc refuses."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        bundled = resources.files("grpc_tools") / "_proto"
        arguments = [f"-I{HERE}", f"-I{bundled}", "--include_imports", f"--descriptor_set_out={out}", *SOURCES]
        code = protoc.main(["protoc", *arguments])
        if code != 0:
            raise RuntimeError(f"protoc ended with {code}, expected 0; its complaint is above")
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    for file in files.file:
        file.ClearField("options")
    data: bytes = files.SerializeToString(deterministic=True)
    return data


def main() -> int:
    fresh = compile_descriptor_set()
    changed = not TARGET.exists() or TARGET.read_bytes() != fresh
    if changed:
        TARGET.write_bytes(fresh)
    print(f"{TARGET.name}: {len(fresh)} bytes, {'written' if changed else 'already fresh'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
