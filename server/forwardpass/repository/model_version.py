"""One version of a model as the repository knows it: its state, and how a request for it is refused."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

from forwardpass.errors import ModelLoading, ModelUnusable, Reason, RequestError, UnknownModel
from forwardpass.repository.loader import Loaded
from forwardpass.repository.model_folder import Fingerprint, Home


class State(enum.Enum):
    """Of one model version. `value` is its name in the protocol's RepositoryIndex."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One version as the index shows it. `loaded` while it is READY.

    `reason` says why it could not be loaded; of a READY one, why it could not be loaded again and serves as it was.
    """

    name: str
    version: str  # empty for a model of which no version can be named
    folder: Path
    state: State
    reason: str = ""
    loaded: Loaded | None = None
    home: Home | None = None
    fingerprint: Fingerprint = ()
    asked_for: bool = True  # False: it was unloaded, or nobody wanted it yet

    @property
    def phase(self) -> str:
        """Its state as the metrics have it, where what failed and what nobody wants differ."""
        if self.state is State.UNAVAILABLE:
            return "failed" if self.asked_for else "not_loaded"
        return "stale" if self.loaded is not None and self.reason else self.state.value.lower()

    @property
    def missing(self) -> bool:
        """Whether it should serve, and does not."""
        return self.asked_for and self.loaded is None


def number(version: str) -> int:
    return int(version) if version else 0


def idle(home: Home) -> Entry:
    """A model that is there and not served."""
    return Entry(home.name, "", home.folder, State.UNAVAILABLE, "not loaded", home=home, asked_for=False)


def refusal(entry: Entry) -> RequestError:
    """What a request for a version that does not serve gets."""
    what = f"version {entry.version} of model '{entry.name}'" if entry.version else f"model '{entry.name}'"
    if not entry.asked_for:
        return UnknownModel(f"{what} is not loaded", reason=Reason.NOT_LOADED)
    if entry.state is State.LOADING:
        return ModelLoading(f"{what} is still loading", retry_after=0.5)
    return ModelUnusable(f"{what} could not be loaded: {entry.reason}")
