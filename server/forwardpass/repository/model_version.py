"""One version of a model in the repository: its state, and the error for requests while it does not serve."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

from forwardpass.errors import ModelLoading, ModelUnusable, Reason, RequestError, UnknownModel
from forwardpass.repository.loader import LoadedModel
from forwardpass.repository.model_folder import Fingerprint, ModelFolder


class VersionState(enum.Enum):
    """The state of one model version. `value` is its name in the protocol's RepositoryIndex."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version in the index. `loaded` is set while it is READY.

    `reason`: why it could not be loaded; for a READY version, why it could not be reloaded and serves unchanged.
    """

    name: str
    version: str  # empty for a model without a known version
    folder: Path
    state: VersionState
    reason: str = ""
    loaded: LoadedModel | None = None
    model_folder: ModelFolder | None = None
    fingerprint: Fingerprint = ()
    asked_for: bool = True  # False: unloaded, or not requested yet

    @property
    def phase(self) -> str:
        """The state in the metrics, which distinguish failed versions from those that were not asked for."""
        if self.state is VersionState.UNAVAILABLE:
            return "failed" if self.asked_for else "not_loaded"
        return "stale" if self.loaded is not None and self.reason else self.state.value.lower()

    @property
    def missing(self) -> bool:
        """Whether it should serve but does not."""
        return self.asked_for and self.loaded is None


def number(version: str) -> int:
    return int(version) if version else 0


def idle(model_folder: ModelFolder) -> ModelVersion:
    """The entry of a model that is on disk and not served."""
    return ModelVersion(
        model_folder.name,
        "",
        model_folder.folder,
        VersionState.UNAVAILABLE,
        "not loaded",
        model_folder=model_folder,
        asked_for=False,
    )


def refusal(entry: ModelVersion) -> RequestError:
    """The error for a request for a version that does not serve."""
    what = f"version {entry.version} of model '{entry.name}'" if entry.version else f"model '{entry.name}'"
    if not entry.asked_for:
        return UnknownModel(f"{what} is not loaded", reason=Reason.NOT_LOADED)
    if entry.state is VersionState.LOADING:
        return ModelLoading(f"{what} is still loading", retry_after=0.5)
    return ModelUnusable(f"{what} could not be loaded: {entry.reason}")
