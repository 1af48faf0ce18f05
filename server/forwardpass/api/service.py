"""Every unary method except ModelInfer, as functions from request message to response message. No gRPC, no I/O.

They raise RequestError; the transport turns that into a status.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from forwardpass import __version__, protocol
from forwardpass.api.model_config import describe
from forwardpass.api.model_statistics import statistics
from forwardpass.errors import InvalidRequest, Reason, RequestError, printable
from forwardpass.model.signature import TensorSpec
from forwardpass.model.triton_config import PLATFORM
from forwardpass.repository.control import ModelControl
from forwardpass.repository.model_version import VersionState
from forwardpass.repository.repository import Repository

# The extensions that every server has, by Triton's names.
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)


class ControlService:
    """The control side of GRPCInferenceService. Methods that change models are coroutines; the rest only read."""

    def __init__(
        self,
        repository: Repository,
        ready: Callable[[], bool],
        control: ModelControl,
        extensions: Sequence[str] = (),
        max_message_bytes: int = 0,
    ) -> None:
        """`extensions`: those that this server has in addition to EXTENSIONS. `max_message_bytes` 0: not told."""
        self._max_message_bytes = max_message_bytes
        self._repository = repository
        self._ready = ready
        self._control = control
        self._extensions = sorted((*EXTENSIONS, *extensions))
        self.methods: Mapping[str, Callable[[Any], Any]] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self._once_loaded(self.model_metadata),
            "ModelConfig": self._once_loaded(self.model_config),
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.repository_model_load,
            "RepositoryModelUnload": self.repository_model_unload,
        }

    def _once_loaded(self, method: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
        """The method, which waits for its model where that is loaded on demand."""

        async def call(request: Any) -> Any:
            try:
                return method(request)
            except RequestError as error:
                loads = self._control.on_demand
                if loads is None or not await loads.wait_for(request.name, request.version, error):
                    raise
            return method(request)

        return call

    def server_live(self, _request: Any) -> Any:
        return protocol.ServerLiveResponse(live=True)

    def server_ready(self, _request: Any) -> Any:
        return protocol.ServerReadyResponse(ready=self._ready())

    def server_metadata(self, _request: Any) -> Any:
        return protocol.ServerMetadataResponse(name="forwardpass", version=__version__, extensions=self._extensions)

    def model_ready(self, request: Any) -> Any:
        """Whether a model is ready. One that does not exist is an error, as in Triton."""
        try:
            self._repository.resolve(request.name, request.version)
        except RequestError as error:
            if error.reason in (Reason.UNKNOWN_MODEL, Reason.INVALID):
                raise
            return protocol.ModelReadyResponse(ready=False)
        return protocol.ModelReadyResponse(ready=True)

    def model_metadata(self, request: Any) -> Any:
        """Name, versions, platform, tensors with their shapes (-1: any size; the batch axis included), labels and
        categories."""
        loaded = self._repository.loaded(request.name, request.version)
        worker = loaded.worker
        versions = [e.version for e in self._repository.entries(worker.name) if e.loaded]
        response = protocol.ModelMetadataResponse(name=worker.name, versions=versions, platform=PLATFORM)
        response.inputs.extend(_tensor(t) for t in worker.signature.inputs)
        response.outputs.extend(_tensor(t) for t in worker.signature.outputs)
        said = response.parameters
        for key, text in loaded.config.parameters.items():
            said[key].string_param = text
        said["batch_invariance"].string_param = loaded.invariance.value
        said["max_request_rows"].int64_param = worker.options.max_request_rows if worker.signature.batchable else 1
        if self._max_message_bytes:
            said["max_message_bytes"].int64_param = self._max_message_bytes
        said["max_batch_size"].int64_param = loaded.max_batch_size if loaded.batches else 0
        said["provider"].string_param = loaded.placement.label
        said["contract"].bool_param = loaded.contract is not None
        return response

    def model_config(self, request: Any) -> Any:
        """The model's options, with everything that the server filled in."""
        return protocol.ModelConfigResponse(config=describe(self._repository.loaded(request.name, request.version)))

    def model_statistics(self, request: Any) -> Any:
        """Statistics of one version; of all served versions of a model; or, without a name, of all models."""
        if request.name:
            self._repository.resolve(request.name, request.version)  # raises if it is not served
        response = protocol.ModelStatisticsResponse()
        for entry in self._repository.entries(request.name or None):
            if request.version in ("", entry.version) and entry.loaded is not None:
                response.model_stats.append(statistics(entry.loaded.worker.metrics))
        return response

    async def repository_index(self, request: Any) -> Any:
        """Every version, its state, and the reason if that is not as expected; and every skipped folder.

        With `ready`, only versions that serve.
        """
        _no_repository(request)
        await self._control.refresh()
        response = protocol.RepositoryIndexResponse()
        for entry in self._repository.entries():
            if entry.state is VersionState.READY or not request.ready:
                reason = entry.reason or (entry.loaded.reservation if entry.loaded is not None else "")
                response.models.add(name=entry.name, version=entry.version, state=entry.state.value, reason=reason)
        for name, version, why in [] if request.ready else self._repository.skipped():
            response.models.add(
                name=name, version=version, state=VersionState.UNAVAILABLE.value, reason=f"skipped: {why}"
            )
        return response

    async def repository_model_load(self, request: Any) -> Any:
        """Load a model, or load it again, with options or files from the request's parameters if it has them."""
        _no_repository(request)
        await self._control.load(request.model_name, request.parameters)
        return protocol.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: Any) -> Any:
        """Stop serving a model. No model depends on another, so `unload_dependents` changes nothing."""
        _no_repository(request)
        for key in request.parameters:
            if key != "unload_dependents":
                raise InvalidRequest(f"parameter '{printable(key)}' is not known; expected 'unload_dependents'")
        await self._control.unload(request.model_name)
        return protocol.RepositoryModelUnloadResponse()


def _no_repository(request: Any) -> None:
    if request.repository_name:
        raise InvalidRequest(
            f"repository_name: expected none, since there is one repository, got '{printable(request.repository_name)}'"
        )


def _tensor(tensor: TensorSpec) -> Any:
    message = protocol.message("inference.ModelMetadataResponse.TensorMetadata")(
        name=tensor.name, datatype=tensor.datatype.name, shape=tensor.shape
    )
    for key, words in (("labels", tensor.labels), ("categories", tensor.categories)):
        if words:
            message.parameters[key].string_param = json.dumps(words, ensure_ascii=False)
    return message
