"""A repository with models that serve, asked in this process, and the page over it with a clock that is set by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.service import models
from tests.unit.made import Collector, message

from forwardpass.batching.admission import Admission
from forwardpass.execution.cpu_budget import CpuBudget
from forwardpass.inference.intake import Intake
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.repository.repository import Repository
from forwardpass.security.tokens import Tokens
from forwardpass.settings import Settings
from forwardpass.status.page import StatusPage
from forwardpass.status.snapshot import ServerFacts, StatusSource

X = np.arange(8, dtype=np.float32).reshape(2, 4)


class Watched:
    """What a page shows, and the means to make something happen."""

    def __init__(self, root: Path) -> None:
        self.now = 1000.0
        self.root = root
        self.admission = Admission(100, 1 << 20)
        cores = CpuBudget(2, "for a test")
        self.repository = Repository(Settings(repository=root, max_batch_size=16), cores, self.admission)
        for entry in self.repository.discover():
            self.repository.load(entry)
        self.metrics = ModelMetrics("", "")
        self.sink = Collector()
        self.intake = Intake(self.sink, self.repository, self.admission, self.metrics, 1 << 20)
        facts = ServerFacts(lambda: True, cores, infer=False)
        self.source = StatusSource(self.repository, self.admission, self.metrics, facts, lambda: self.now)

    def page(self, tokens: Tokens | None = None) -> StatusPage:
        return StatusPage(self.source, self.repository, tokens)

    def ask(self, name: str, times: int = 1) -> None:
        """Send X to a model, one request after the other."""
        for call in range(times):
            self.intake.begin()
            taken = self.intake.take(call, message([("x", X)], model_name=name).SerializeToString(), None)
            self.intake.flush()
            while self.intake.run_pending():
                pass
            if taken is not None:
                self.sink.wait([taken])
            self.sink.answers.clear()

    def look(self, seconds: float = 1.0) -> dict[str, Any]:
        """The document, `seconds` later."""
        self.now += seconds
        document: dict[str, Any] = json.loads(self.source.document())
        return document


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[[], Watched]]:
    """Opens `tmp_path`, into which the test has put its models; has `one` and `two` if it put none."""
    opened: list[Watched] = []

    def open_it() -> Watched:
        root = tmp_path / "models"
        if not root.exists():
            models.save(root, "one", models.chain())
            models.save(root, "two", models.chain(seed=1))
        opened.append(Watched(root))
        return opened[-1]

    yield open_it
    for made in opened:
        assert made.repository.close(5.0)
        assert made.admission.requests == 0
