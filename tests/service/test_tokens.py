"""Bearer tokens behind both transports: roles, refusals, what is exempt, and a file of tokens that changes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from forwardpass import protocol
from forwardpass.security.tokens import ADMIN_METHODS
from forwardpass.testing.server_process import ServerProcess

INFER, ADMIN, HASHED = "infer-token-0123456789", "admin-token-0123456789", "hashed-token-0123456789"
SECONDS = 60.0

UNAUTHENTICATED, PERMISSION_DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


def write(path: Path, infer: str = INFER) -> Path:
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    path.write_text(f"# who may call\n\ninfer {infer}\nadmin {ADMIN}\ninfer sha256:{digest}\n")
    return path


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tokens")
    models.save(folder / "models", "chain", models.chain())
    tokens = write(folder / "tokens")
    with ServerProcess(
        folder / "models", "--transport", request.param, "--tokens", str(tokens), "--reflection"
    ) as server:
        server.tokens = tokens  # type: ignore[attr-defined]
        yield server
        assert server.stop() == 0, server.tail()


def request(method: str) -> Any:
    message = protocol.METHODS[method].request()
    if method in ("ModelInfer", "ModelStreamInfer"):
        message.model_name = "chain"
        message.inputs.add(name="x", datatype="FP32", shape=(1, 4))
        message.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
    elif method in ("ModelMetadata", "ModelReady", "ModelConfig"):
        message.name = "chain"
    elif method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        message.model_name = "no-such-model"
    return message


def call(server: ServerProcess, method: str, *authorization: str) -> grpc.StatusCode:
    """The status that a method gives with these `authorization` entries."""
    what = protocol.METHODS[method]
    metadata = [("authorization", value) for value in authorization]
    with grpc.insecure_channel(server.address) as channel:
        try:
            if what.client_streaming:
                stream = channel.stream_stream(what.path, what.request.SerializeToString, what.response.FromString)
                list(stream(iter([request(method)]), metadata=metadata, timeout=SECONDS))
            else:
                unary = channel.unary_unary(what.path, what.request.SerializeToString, what.response.FromString)
                unary(request(method), metadata=metadata, timeout=SECONDS)
        except grpc.RpcError as error:
            assert not any(token in (error.details() or "") for token in (INFER, ADMIN, HASHED))
            return error.code()
        return grpc.StatusCode.OK


@pytest.mark.parametrize("method", sorted(protocol.METHODS))
def test_every_method_needs_a_token_of_its_role(running: ServerProcess, method: str) -> None:
    assert call(running, method) is UNAUTHENTICATED
    assert call(running, method, "Bearer wrong-token-0123456789") is UNAUTHENTICATED
    with_infer = call(running, method, f"Bearer {INFER}")
    with_admin = call(running, method, f"Bearer {ADMIN}")
    assert with_admin not in (UNAUTHENTICATED, PERMISSION_DENIED)
    if method in ADMIN_METHODS:
        assert with_infer is PERMISSION_DENIED
    else:
        assert with_infer is with_admin


@pytest.mark.parametrize(
    "authorization",
    [
        (),
        ("",),
        ("Bearer",),
        ("Bearer ",),
        (INFER,),
        (f"Basic {INFER}",),
        (f"Bearer {INFER}x",),
        (f"Bearer {INFER[:-1]}",),
        (f"Bearer {INFER} {INFER}",),
        (f"Bearer sha256:{hashlib.sha256(HASHED.encode()).hexdigest()}",),
        (f"Bearer {INFER}", f"Bearer {INFER}"),
    ],
)
@pytest.mark.parametrize("method", ["ModelInfer", "ServerReady", "ModelStreamInfer"])
def test_anything_else_is_refused(running: ServerProcess, method: str, authorization: tuple[str, ...]) -> None:
    # HTTP/2 allows no value that ends in a blank (RFC 9113, 8.2.1): libnghttp2 resets such a call before it is read.
    blank = any(value != value.strip() for value in authorization)
    assert call(running, method, *authorization) in {UNAUTHENTICATED, *([grpc.StatusCode.INTERNAL] if blank else ())}


@pytest.mark.parametrize("authorization", [f"Bearer {INFER}", f"bearer {INFER}", f"Bearer {HASHED}", f"Bearer {ADMIN}"])
def test_a_good_token_gets_an_answer(running: ServerProcess, authorization: str) -> None:
    assert call(running, "ModelInfer", authorization) is grpc.StatusCode.OK


def test_health_needs_no_token_and_reflection_does(running: ServerProcess) -> None:
    check = protocol.HEALTH_METHODS["Check"]
    reflect = f"/{protocol.REFLECTION_SERVICE}/ServerReflectionInfo"
    with grpc.insecure_channel(running.address) as channel:
        health = channel.unary_unary(check.path, check.request.SerializeToString, check.response.FromString)
        assert health(check.request(), timeout=SECONDS).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            next(channel.stream_stream(reflect)(iter([b""]), timeout=SECONDS))
    assert caught.value.code() is UNAUTHENTICATED


def test_refusals_are_counted(running: ServerProcess) -> None:
    def count(reason: str) -> float:
        families = {f.name: f for f in text_string_to_metric_families(running.metrics())}
        samples = families["forwardpass_refused"].samples
        return sum(s.value for s in samples if s.labels["reason"] == reason)

    before = count("unauthenticated"), count("permission")
    call(running, "ModelInfer")
    call(running, "ServerReady")
    call(running, "SystemSharedMemoryStatus", f"Bearer {INFER}")
    assert (count("unauthenticated"), count("permission")) == (before[0] + 2, before[1] + 1)


def test_the_file_is_read_again_and_a_bad_one_changes_nothing(running: ServerProcess) -> None:
    path: Path = running.tokens  # type: ignore[attr-defined]
    new = "another-token-0123456789"
    moment = threading.Event()

    def until(token: str, status: grpc.StatusCode) -> None:
        for _ in range(200):
            if call(running, "ModelInfer", f"Bearer {token}") is status:
                return
            moment.wait(0.05)
        raise AssertionError(f"{token} never was {status}")

    try:
        write(path, new)
        until(new, grpc.StatusCode.OK)
        assert call(running, "ModelInfer", f"Bearer {INFER}") is UNAUTHENTICATED
        path.write_text("admin short\n")
        for _ in range(200):
            if 'files="tokens",result="failed"} 1' in running.metrics():
                break
            assert call(running, "ModelInfer", f"Bearer {new}") is grpc.StatusCode.OK
            moment.wait(0.05)
        assert 'files="tokens",result="failed"} 1' in running.metrics()
        assert call(running, "ModelInfer", f"Bearer {new}") is grpc.StatusCode.OK
        assert not any(new in line or ADMIN in line for line in running.lines)
    finally:
        write(path)
        until(INFER, grpc.StatusCode.OK)


Serve = Callable[..., ServerProcess]


def test_tokens_go_over_tls_as_well(serve: Serve, tmp_path: Path) -> None:
    from certificates import Authority

    authority = Authority(tmp_path / "authority")
    pair = authority.issue("server")
    models.save(tmp_path / "models", "chain", models.chain())
    server = serve(
        tmp_path / "models",
        *("--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key)),
        *("--tokens", str(write(tmp_path / "tokens"))),
    )
    what = protocol.METHODS["ModelInfer"]
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(authority.certificate.read_bytes()), grpc.access_token_call_credentials(INFER)
    )
    with grpc.secure_channel(server.address, credentials) as channel:
        infer = channel.unary_unary(what.path, what.request.SerializeToString, what.response.FromString)
        assert infer(request("ModelInfer"), timeout=SECONDS).model_name == "chain"
    with grpc.secure_channel(
        server.address, grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    ) as channel:
        infer = channel.unary_unary(what.path, what.request.SerializeToString, what.response.FromString)
        with pytest.raises(grpc.RpcError) as caught:
            infer(request("ModelInfer"), timeout=SECONDS)
    assert caught.value.code() is UNAUTHENTICATED
