"""Networks as people write them, served in mixed batches by both transports: every answer is that of its rows alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tests.service.mixed_answers import MixedLoad, batch_sizes, send
from tests.unit.model.torch_networks import KINDS, MIXES

from forwardpass import Client
from forwardpass.export import export
from forwardpass.testing.server_process import ServerProcess

ANSWERS = 10_000  # of each network, by each transport
LARGEST_BATCH = 64
# Batches gather for so long: grpcio's server hands over requests more slowly than a small network answers them.
OPTIONS = "max_queue_delay_us = 2000\ninstances = 1\n"
# Rows of a batch that no request alone makes.
MIXED = 4

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def model_name(name: str) -> str:
    return name.replace(" ", "-")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with every network whose rows are not proved to mix, exported with contracts."""
    repository = tmp_path_factory.mktemp("zoo")
    for flow, cases in KINDS.values():
        if flow is MIXES:
            continue
        for name, (network, inputs) in cases().items():
            torch.manual_seed(0)
            given = dict(zip("xy", (np.asarray(tensor) for tensor in inputs), strict=False))
            specs = [f"{n}:{a.dtype.name}[{','.join(map(str, ('batch', *a.shape[1:])))}]" for n, a in given.items()]
            export(network.eval(), specs, model_name(name), repository, samples=given)
            (repository / model_name(name) / "model.toml").write_text(OPTIONS)
    return repository


@pytest.mark.parametrize("transport", ["direct", "grpcio"])
def test_every_answer_of_a_mixed_batch_is_that_of_its_rows_alone(zoo: Path, transport: str) -> None:
    wrong: list[str] = []
    options = ("--transport", transport, "--max-batch-size", str(LARGEST_BATCH))
    print(f"\n{transport}: | networks | served batched | answers | refused rightly | rows in mixed batches | wrong |")
    with (
        ServerProcess(zoo, *options, patience=600.0) as server,
        Client(server.address) as client,
        triton.InferenceServerClient(server.address) as statistics,
    ):

        def runs(name: str) -> Counter[int]:
            return batch_sizes(statistics.get_inference_statistics(name, "1").model_stats[0])

        for kind, (flow, cases) in KINDS.items():
            verdicts: Counter[str] = Counter()
            answers = refused = rows = mixed = 0
            before_kind = len(wrong)
            for name in (model_name(name) for name in (cases() if flow is not MIXES else ())):
                verdict = client.metadata(name).parameters["batch_invariance"]
                verdicts[str(verdict)] += 1
                if verdict not in ("exact", "rounding"):
                    assert flow.value == "unknown", f"{name}: proved to be independent, and {verdict}"
                    continue
                load = MixedLoad(name, zoo / name / "1", exact=verdict == "exact")
                before = runs(name)
                found = send(server.address, load, ANSWERS, seed=1)
                made = runs(name) - before
                own = sum(size * count for size, count in made.items())
                own_mixed = sum(size * count for size, count in made.items() if size >= MIXED)
                assert own_mixed > own / 2, f"{name}: {own_mixed} of {own} rows ran in mixed batches: {made}"
                answers, refused, rows, mixed = (
                    answers + found.answers, refused + found.refused, rows + own, mixed + own_mixed,
                )  # fmt: skip
                wrong += [f"{name} ({verdict}): {what}" for what in found.wrong]
                if found.largest:
                    print(f"{transport}: {name} differs by {found.largest:.2g} of what is allowed at most")
                assert not found.tipped, name
            if answers:
                said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
                print(f"{transport}: | {kind} | {said} | {answers:,} | {refused:,} | {mixed / rows:.0%} | "
                      f"{len(wrong) - before_kind} |", flush=True)  # fmt: skip
    assert not wrong, "\n".join([f"{len(wrong)} wrong answers", *wrong[:20]])
