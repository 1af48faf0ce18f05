"""One version of a model in the repository: its state, and the error for requests while it does not serve."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from forwardpass.errors import ModelError, ModelLoading, ModelUnusable, Reason, RequestError, UnknownModel, printable
from forwardpass.inference.worker import Worker
from forwardpass.repository.loader import LoadedModel
from forwardpass.repository.model_folder import Fingerprint, ModelFolder

ALL_VERSIONS = ""  # in place of a version


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


def idle(model_folder: ModelFolder, reason: str = "not loaded") -> ModelVersion:
    """The entry of a model that is on disk and not served."""
    return ModelVersion(
        model_folder.name,
        "",
        model_folder.folder,
        VersionState.UNAVAILABLE,
        reason,
        model_folder=model_folder,
        asked_for=False,
    )


def announced(model_folder: ModelFolder) -> list[ModelVersion]:
    """The entries of the versions that must be loaded, as they are on disk; one that fails where there is none."""
    try:
        versions = model_folder.chosen(model_folder.config())
    except ModelError:  # raised again, and reported, when it is loaded
        versions = model_folder.latest()
    found = versions.items() or [("", model_folder.folder)]
    return [loading(model_folder, str(version), folder) for version, folder in found]


def loading(model_folder: ModelFolder, version: str, folder: Path) -> ModelVersion:
    """The entry of a version that is about to be loaded."""
    return ModelVersion(model_folder.name, version, folder, VersionState.LOADING, model_folder=model_folder)


def withdrawn(new: ModelVersion, before: ModelVersion | None, failed: Mapping[str, str]) -> ModelVersion:
    """The entry of a version that was loaded here, where other processes `failed` to load it; closes what was loaded.

    `before`: its entry until now. `failed`: reasons by version, or for ALL_VERSIONS.
    """
    reason = failed.get(new.version) or failed.get(ALL_VERSIONS)
    if new.loaded is None or new.reason or reason is None:
        return new
    is_new = before is None or before.loaded is not new.loaded
    if is_new:
        new.loaded.worker.close(0.0)
    if before is not None and before.loaded is not None:
        return dataclasses.replace(before, reason=f"serves as it was; it could not be loaded again: {reason}")
    return dataclasses.replace(new, state=VersionState.UNAVAILABLE, reason=reason, loaded=None, fingerprint=())


def look_up(entries: Iterable[ModelVersion]) -> dict[tuple[str, str], Worker | ModelVersion]:
    """By name and version: the worker, or the entry of one that does not serve. Version "": the latest that serves."""
    table: dict[tuple[str, str], Worker | ModelVersion] = {}
    ready: set[str] = set()
    for e in sorted(entries, key=lambda e: number(e.version)):
        table[e.name, e.version] = found = e if e.loaded is None else e.loaded.worker
        if e.loaded is not None or e.name not in ready:
            table[e.name, ""] = found
        if e.loaded is not None:
            ready.add(e.name)
    return table


def unknown(name: str, version: str, known: Collection[tuple[str, str]]) -> UnknownModel:
    """The error for a request for what is not in the index. `known`: names and versions; "" is any version."""
    if (name, "") in known:
        versions = ", ".join(v for n, v in known if n == name and v) or "none"
        return UnknownModel(f"model '{printable(name)}' has no version '{printable(version)}'; it has {versions}")
    served = f"; served are {', '.join(sorted({n for n, _ in known})[:10])}" if known else ""
    return UnknownModel(f"there is no model '{printable(name)}'{served}")


def refusal(entry: ModelVersion) -> RequestError:
    """The error for a request for a version that does not serve."""
    what = f"version {entry.version} of model '{entry.name}'" if entry.version else f"model '{entry.name}'"
    if not entry.asked_for:
        return UnknownModel(f"{what} is {_not_loaded(entry.reason)}", reason=Reason.NOT_LOADED)
    if entry.state is VersionState.LOADING:
        return ModelLoading(f"{what} is still loading", retry_after=0.5)
    return ModelUnusable(f"{what} could not be loaded: {entry.reason}")


def _not_loaded(reason: str) -> str:
    return reason if reason.startswith("not loaded") else "not loaded"


def unexpected(error: Exception) -> str:
    """The reason why a model can't be loaded, for an unexpected exception."""
    if isinstance(error, MemoryError):
        return f"it takes more memory than there is: {error}" if str(error) else "it takes more memory than there is"
    return "internal error; the server's log has the details"
