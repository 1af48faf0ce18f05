"""One version of a model as the repository knows it: its state, and how a request for it is refused."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

from forwardpass.errors import ModelLoading, ModelUnusable, Reason, RequestError, UnknownModel
from forwardpass.repository.loader import LoadedModel
from forwardpass.repository.model_folder import Fingerprint, ModelFolder


class VersionState(enum.Enum):
    """Of one model version. `value` is its name in the protocol's RepositoryIndex."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version as the index shows it. `loaded` while it is READY.

    `reason` says why it could not be loaded; of a READY one, why it could not be loaded again and serves as it was.
    """

    name: str
    version: str  # empty for a model of which no version can be named
    folder: Path
    state: VersionState
    reason: str = ""
    loaded: LoadedModel | None = None
    model_folder: ModelFolder | None = None
    fingerprint: Fingerprint = ()
    asked_for: bool = True  # False: it was unloaded, or nobody wanted it yet

    @property
    def phase(self) -> str:
        """Its state as the metrics have it, where what failed and what nobody wants differ."""
        if self.state is VersionState.UNAVAILABLE:
            return "failed" if self.asked_for else "not_loaded"
        return "stale" if self.loaded is not None and self.reason else self.state.value.lower()

    @property
    def missing(self) -> bool:
        """Whether it should serve, and does not."""
        return self.asked_for and self.loaded is None


def number(version: str) -> int:
    return int(version) if version else 0


def idle(model_folder: ModelFolder) -> ModelVersion:
    """A model that is there and not served."""
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
    """What a request for a version that does not serve gets."""
    what = f"version {entry.version} of model '{entry.name}'" if entry.version else f"model '{entry.name}'"
    if not entry.asked_for:
        return UnknownModel(f"{what} is not loaded", reason=Reason.NOT_LOADED)
    if entry.state is VersionState.LOADING:
        return ModelLoading(f"{what} is still loading", retry_after=0.5)
    return ModelUnusable(f"{what} could not be loaded: {entry.reason}")
