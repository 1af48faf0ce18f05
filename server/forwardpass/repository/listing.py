"""Looks at the repository's folder: which models are there, and what in it is skipped, and why.

A look that fails is an error and never an empty repository: only one that worked may take a model away. It may block
for as long as the disk does.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from forwardpass.errors import ModelError, RepositoryUnreadable, SettingsError
from forwardpass.repository.model_folder import ModelFolder, find, identity

logger = logging.getLogger(__name__)


class RepositoryListing:
    """Thread-safe. What it knows is that of the last look that worked.

    - A folder that had models, and is empty and another folder than it was, is taken for a volume that is not mounted.
    - A failure is counted each time, and logged when it is another than that before.
    """

    def __init__(self, root: Path, name: str) -> None:
        """See `find`."""
        self._root = root
        self._name = name
        self._lock = threading.Lock()
        self._had: dict[Path, tuple[int, int] | None] = {}  # folders that had models or versions, by their identity
        self._failure = ""
        self.failures = 0
        self.skipped: dict[tuple[str, str], str] = {}  # (folder, what in it or "") -> why

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
        for model_folder in find(self._root, self._name):
            here = identity(model_folder.folder)
            if model_folder.present():
                model_folders[model_folder.name] = model_folder
                self._had[model_folder.folder] = here
            elif here is not None and self._had.get(model_folder.folder, here) != here:
                model_folders[model_folder.name] = (
                    model_folder  # loading it fails, with the reason, and what serves stays
                )
            else:
                self._had.pop(model_folder.folder, None)
                skipped[model_folder.name, ""] = "there is no version in it: expected NAME/VERSION/model.onnx"
            try:
                skipped |= {(model_folder.name, name): reason for name, reason in model_folder.skipped().items()}
            except ModelError:
                continue  # said when it is loaded
        here = identity(self._root)
        if model_folders:
            self._had[self._root] = here
        elif self._had.get(self._root, here) != here:
            raise SettingsError("it is empty, and not the folder that had models before: is its volume mounted?")
        return model_folders, skipped
