"""Hidden activations as outputs on request: what a foreign client gets by name is what PyTorch computes inside.

The three recipes' networks, exported with their activations exposed, on one server; `mnist` with random weights, since
nothing here depends on them and training takes a while.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tritonclient.grpc as triton

from forwardpass.cli.main import main
from forwardpass.errors import ExportError
from forwardpass.export import export
from forwardpass.model.contract import Contract, compare
from forwardpass.testing.server_process import ServerProcess

MODELS = Path(__file__).parents[2] / "models"
pytestmark = pytest.mark.slow  # three networks are trained and exported

NETWORKS = {"document": ("FeedForwardNet", 5), "digits": ("Digits", 64), "mnist": ("Mnist", 784)}


@dataclass
class Served:
    """One network: as a module, as exported with its activations, and as exported without."""

    module: torch.nn.Module
    contract: Contract
    hidden: Path
    plain: Path

    def rows(self, count: int) -> np.ndarray:
        given = self.contract.input_arrays()["x"]
        return np.resize(given, (count, given.shape[1]))

    def activations(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """What the ReLUs and the network give, in float64, as PyTorch computes it."""
        found: dict[str, np.ndarray] = {}
        double = self.module.double()
        relus = [module for module in double.modules() if isinstance(module, torch.nn.ReLU)]

        def keep(name: str) -> Any:
            return lambda _module, _given, answer: found.__setitem__(name, answer.numpy())

        hooks = [relu.register_forward_hook(keep(f"a{i}")) for i, relu in enumerate(relus, 1)]
        with torch.no_grad():
            found["logits"] = double(torch.from_numpy(x.astype(np.float64))).numpy()
        for hook in hooks:
            hook.remove()
        self.module.float()
        return found


@pytest.fixture(scope="module")
def networks(
    tmp_path_factory: pytest.TempPathFactory, digits_repository: Path, document_repository: Path
) -> dict[str, Served]:
    folder = tmp_path_factory.mktemp("hidden")
    torch.manual_seed(0)
    found = {}
    for name, (class_name, features) in NETWORKS.items():
        spec = importlib.util.spec_from_file_location(f"{name}_network", MODELS / name / "network.py")
        assert spec is not None and spec.loader is not None
        source = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(source)
        module = getattr(source, class_name)()
        if name != "mnist":
            module.load_state_dict(torch.load(MODELS / name / "weights.pt", weights_only=True))
        inputs = {"x": f"float32[batch,{features}]"}
        paths = [
            export(module.eval(), inputs, name, folder / kind, outputs=["logits"], expose_hidden=kind == "hidden").path
            for kind in ("hidden", "plain")
        ]
        found[name] = Served(module, Contract.load(paths[0] / "contract.json"), *paths)
    return found


@pytest.fixture(scope="module")
def server(networks: dict[str, Served]) -> Iterator[ServerProcess]:
    with ServerProcess(networks["digits"].hidden.parents[1]) as running:
        yield running


def ask(server: ServerProcess, model: str, x: np.ndarray, *names: str) -> dict[str, np.ndarray]:
    """The answer by output; `names` are those asked for, none for those that come by themselves."""
    with triton.InferenceServerClient(server.address) as client:
        given = triton.InferInput("x", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        wanted = [triton.InferRequestedOutput(name) for name in names] or None
        answer = client.infer(model, [given], outputs=wanted)
        return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_asked_for_by_name_is_what_torch_computes_inside(
    server: ServerProcess, networks: dict[str, Served], name: str
) -> None:
    network = networks[name]
    x = network.rows(9)
    expected = network.activations(x)
    got = ask(server, name, x, *expected)
    assert list(got) == list(expected)
    difference = compare(got, expected, network.contract.tolerance)
    assert difference.failure is None, difference.failure
    assert 0 < difference.largest < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_nobody_gets_what_nobody_asked_for(server: ServerProcess, networks: dict[str, Served], name: str) -> None:
    network = networks[name]
    x = network.rows(5)
    got = ask(server, name, x)
    assert list(got) == ["logits"]
    # And the answer has the bits of a network whose activations are not exposed.
    plain = onnxruntime.InferenceSession(network.plain / "model.onnx").run(None, {"x": x})
    assert got["logits"].tobytes() == plain[0].tobytes()


def test_requests_for_different_outputs_do_not_disturb_each_other(
    server: ServerProcess, networks: dict[str, Served]
) -> None:
    rows = networks["digits"].rows(32)
    wanted = [("logits",), ("a1",), ("a2", "logits"), ("a1", "a2"), ()]
    alone = {names: ask(server, "digits", rows[:1], *names) for names in wanted}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: ask(server, "digits", rows[:1], *wanted[i % 5]), range(200)))
    for i, answer in enumerate(answers):
        expected = alone[wanted[i % 5]]
        assert {k: v.tobytes() for k, v in answer.items()} == {k: v.tobytes() for k, v in expected.items()}


def test_exposing_leaves_what_is_fused_as_it_is(networks: dict[str, Served], tmp_path: Path) -> None:
    def runs(path: Path) -> list[str]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(path / "model.onnx", options)
        return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]

    for network in networks.values():
        assert runs(network.hidden) == runs(network.plain)
        assert "FusedGemm" in runs(network.hidden)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_equations_in_float64_hold_for_the_served_answer(
    server: ServerProcess, networks: dict[str, Served], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", networks[name].rows(8))
    folder = str(networks[name].hidden.parents[1])
    command = ["trace", name, "--repository", folder, "--input", str(tmp_path / "x.npy"), "--server", server.address]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    for tensor in ("z1", "a1"):
        assert [line for line in lines if line.startswith(tensor) and line.endswith("holds")]
    # Over the wire: the answer and the activations alike.
    assert [line.split()[0] for line in lines if f"from {server.address}" in line] == [
        "logits",
        *(tensor.name for tensor in networks[name].contract.hidden),
    ]
    assert 0 < float(lines[-1].removeprefix("largest difference ")) < 1e-4


def test_a_network_without_a_layer_before_its_outputs_has_nothing_to_expose(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no layer before its outputs"):
        export(torch.nn.Linear(3, 2), {"x": "float32[batch,3]"}, "linear", tmp_path, expose_hidden=True)
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    with pytest.raises(ExportError, match="named a1, but the network has a tensor 'a1'"):
        export(network, {"a1": "float32[batch,3]"}, "mlp", tmp_path, expose_hidden=True)
