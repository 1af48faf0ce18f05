"""Lists the repository's folder: its models, and skipped entries with the reasons.

A failed listing is an error, never an empty repository: only a successful one may remove a model. It blocks on the
disk.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from forwardpass.errors import ModelError, RepositoryUnreadable, SettingsError
from forwardpass.repository.model_folder import ModelFolder, find, identity

logger = logging.getLogger(__name__)


class RepositoryListing:
    """Thread-safe. Holds the result of the last successful listing.

    - A folder that had models, and is now empty and a different folder, is treated as a volume that is not mounted.
    - Every failure is counted; it is logged if it differs from the one before.
    """

    def __init__(self, root: Path, name: str, ignore_unsupported: bool = False) -> None:
        """See `find`."""
        self._ignore_unsupported = ignore_unsupported
        self._root = root
        self._name = name
        self._lock = threading.Lock()
        self._had: dict[Path, tuple[int, int] | None] = {}  # folders that had models or versions -> their identity then
        self._failure = ""
        self.failures = 0
        self.skipped: dict[tuple[str, str], str] = {}  # (folder, entry in it or "") -> reason

    def model_folders(self) -> dict[str, ModelFolder]:
        """The models on disk, by name. Raises RepositoryUnreadable."""
        with self._lock:
            try:
                found, skipped = self._look()
            except (OSError, SettingsError) as error:
                reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
                text = f"the repository {self._root} cannot be read: {reason}"
                self.failures += 1
                if text != self._failure:
                    logger.error("%s; models stay as they are", text)
                self._failure = text
                raise RepositoryUnreadable(text, retry_after=1.0) from None
            if self._failure:
                logger.info("the repository %s can be read again", self._root)
            self._failure = ""
            for (name, version), reason in skipped.items():
                if self.skipped.get((name, version)) != reason:
                    logger.warning("%s is skipped: %s", f"{name}/{version}" if version else name, reason)
            self.skipped = skipped
            return found

    def _look(self) -> tuple[dict[str, ModelFolder], dict[tuple[str, str], str]]:
        model_folders: dict[str, ModelFolder] = {}
        skipped: dict[tuple[str, str], str] = {}
        for model_folder in find(self._root, self._name, self._ignore_unsupported):
            here = identity(model_folder.folder)
            if model_folder.present():
                model_folders[model_folder.name] = model_folder
                self._had[model_folder.folder] = here
            elif here is not None and self._had.get(model_folder.folder, here) != here:
                model_folders[model_folder.name] = (
                    model_folder  # loading it fails with the reason, and versions in service stay
                )
            else:
                self._had.pop(model_folder.folder, None)
                skipped[model_folder.name, ""] = "there is no version in it: expected NAME/VERSION/model.onnx"
            try:
                skipped |= {(model_folder.name, name): reason for name, reason in model_folder.skipped().items()}
            except ModelError:
                continue  # reported when it is loaded
        here = identity(self._root)
        if model_folders:
            self._had[self._root] = here
        elif self._had.get(self._root, here) != here:
            raise SettingsError("it is empty, and not the folder that had models before: is its volume mounted?")
        return model_folders, skipped
