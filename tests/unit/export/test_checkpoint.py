"""A network from a file and weights from another: what fits goes in, what does not is named."""

from __future__ import annotations

import argparse
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forwardpass.errors import ExportError
from forwardpass.export.checkpoint import build, load_weights
from networks import Mlp

NETWORKS = Path(__file__).with_name("networks.py")


def test_a_class_with_arguments_and_a_function_are_built() -> None:
    network, is_class = build(f"{NETWORKS}:Mlp", {"features": 2, "classes": 7})
    assert is_class
    assert network(torch.zeros(1, 2)).shape == (1, 7)
    network, is_class = build(f"{NETWORKS}:trained", {})
    assert not is_class
    assert network(torch.zeros(1, 5)).shape == (1, 3)


def test_the_files_own_folder_is_importable(tmp_path: Path) -> None:
    (tmp_path / "sizes_of_it.py").write_text("FEATURES = 3\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom sizes_of_it import FEATURES\ndef make():\n    return nn.Linear(FEATURES, 1)\n"
    )
    network, _ = build(f"{tmp_path / 'net.py'}:make", {})
    assert network(torch.zeros(1, 3)).shape == (1, 1)


@pytest.mark.parametrize(
    ("target", "arguments", "says"),
    [
        ("networks.py", {}, "expected FILE.py:NAME"),
        (":Mlp", {}, "expected FILE.py:NAME"),
        ("nowhere.py:Mlp", {}, "nowhere.py: there is no such file"),
        (f"{NETWORKS}:Nothing", {}, "no class, function or network 'Nothing'"),
        (f"{NETWORKS}:Mlp", {"width": 3}, "Mlp(width=3) failed: TypeError"),
        (f"{NETWORKS}:Mlp", {"activation": "sine"}, "Mlp(activation='sine') failed: KeyError"),
        (f"{NETWORKS}:Path", {}, "no class, function or network 'Path'"),
        ("{folder}/broken.py:Mlp", {}, "broken.py: failed as it was imported: ModuleNotFoundError"),
        ("{folder}/odd.py:make", {}, "make made a int; expected a torch.nn.Module"),
    ],
)
def test_what_is_no_network_is_refused(tmp_path: Path, target: str, arguments: dict[str, Any], says: str) -> None:
    (tmp_path / "broken.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "odd.py").write_text("def make():\n    return 3\n")
    with pytest.raises(ExportError) as refusal:
        build(target.format(folder=tmp_path), arguments)
    assert says in str(refusal.value)


def nested(key: str) -> Any:
    return lambda state: {key: state, "epoch": 3, "loss": 0.5}


def prefixed(prefix: str) -> Any:
    return lambda state: {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        nested("state_dict"),
        nested("model_state_dict"),
        nested("model"),
        prefixed("module."),
        prefixed("_orig_mod."),
    ],
)
def test_weights_are_loaded_from_what_training_loops_save(tmp_path: Path, wrap: Any) -> None:
    torch.manual_seed(0)
    trained, network = Mlp(), Mlp()
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pt")
    load_weights(network, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), network.parameters(), strict=True))


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    network = Mlp()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = Mlp().state_dict()
    state["head.bias"] = state.pop("output.bias")
    state["hidden.weight"] = torch.zeros(10, 6)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ExportError) as refusal:
        load_weights(network, tmp_path / "w.pt")
    text = str(refusal.value)
    assert f"{tmp_path / 'w.pt'}: does not fit Mlp: " in text
    assert "missing: output.bias" in text
    assert "unexpected: head.bias" in text
    assert "hidden.weight has shape [10, 6], expected [10, 5]" in text
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_many_misfits_are_counted(tmp_path: Path) -> None:
    torch.save({f"other.{i}": torch.zeros(1) for i in range(30)}, tmp_path / "w.pt")
    with pytest.raises(ExportError, match=r"unexpected: other\.0, other\.1, other\.2, other\.3 and 26 more"):
        load_weights(Mlp(), tmp_path / "w.pt")


class Trap:
    """Would run when unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("content", ["trap", "module", "junk", "empty", "list", "none"])
def test_a_file_that_holds_no_state_dict_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    match content:
        case "trap":
            torch.save({"a": Trap()}, path)
        case "module":
            torch.save(Mlp(), path)
        case "junk":
            path.write_bytes(b"no weights at all" * 10)
        case "empty":
            path.write_bytes(b"")
        case "list":
            path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ExportError) as refusal:
        load_weights(Mlp(), path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert not (tmp_path / "sprung").exists()


# -- as people have their code and their checkpoints ------------------------------------------------------------------

NET = "import torch\n\nclass Net(torch.nn.Linear):\n    def __init__(self): super().__init__(3, 2)\n"


def test_a_module_of_a_package_is_imported_by_name_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "project_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sizes.py").write_text("WIDTH = 3\n")
    (package / "net.py").write_text(
        "import torch\nfrom .sizes import WIDTH\n\nclass Net(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(WIDTH, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert build("project_of_mine.net:Net", {})[0].in_features == 3
    assert build(f"{package / 'net.py'}:Net", {})[0].in_features == 3


def test_a_network_that_is_there_already_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(NET + "\nnet = Net()\n")
    network, random = build(f"{tmp_path / 'made.py'}:net", {})
    assert isinstance(network, torch.nn.Linear) and not random
    with pytest.raises(ExportError, match="net is a network already; it takes no arguments, got width"):
        build(f"{tmp_path / 'made.py'}:net", {"width": 3})
    with pytest.raises(ExportError, match="has no class, function or network 'Model'; it has Net, net"):
        build(f"{tmp_path / 'made.py'}:Model", {})


def test_a_file_that_parses_arguments_at_its_top_is_given_none(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import argparse\nargs = argparse.ArgumentParser().parse_args()\n" + NET)
    assert isinstance(build(f"{tmp_path / 'script.py'}:Net", {})[0], torch.nn.Linear)


@pytest.mark.parametrize("key", ["net", "params_ema", "params", "ema", "network"])
def test_weights_are_found_under_the_keys_that_people_use(tmp_path: Path, key: str) -> None:
    source, network = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    torch.save({"epoch": 3, key: source.state_dict()}, tmp_path / "c.pt")
    load_weights(network, tmp_path / "c.pt")
    assert torch.equal(network.weight, source.weight)


def test_a_key_says_where_the_weights_are(tmp_path: Path) -> None:
    source, network = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    torch.save({"state_dict": {}, "runs": {"best": source.state_dict()}}, tmp_path / "c.pt")
    load_weights(network, tmp_path / "c.pt", "runs.best")
    assert torch.equal(network.weight, source.weight)
    with pytest.raises(ExportError, match=r"has no 'last' of the key 'runs.last'; it has best"):
        load_weights(network, tmp_path / "c.pt", "runs.last")


def test_weights_are_read_from_arrays_and_from_torchscript(tmp_path: Path) -> None:
    source = torch.nn.Linear(3, 2)
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in source.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(source, torch.ones(1, 3)), str(tmp_path / "s.pt"))
    for file in ("w.npz", "s.pt"):
        network = torch.nn.Linear(3, 2)
        load_weights(network, tmp_path / file)
        assert torch.equal(network.weight, source.weight), file


def test_a_pickled_network_is_read_only_if_allowed(tmp_path: Path) -> None:
    """Its class is in `__main__`, as where a training script saved it."""
    (tmp_path / "net.py").write_text(NET)
    network, _ = build(f"{tmp_path / 'net.py'}:Net", {})
    trained, _ = build(f"{tmp_path / 'net.py'}:Net", {})
    kind = type(trained)
    name, kind.__module__ = kind.__module__, "__main__"
    main = sys.modules["__main__"]
    main.Net = kind  # type: ignore[attr-defined]
    try:
        torch.save(trained, tmp_path / "whole.pt")
        torch.save({"epoch": 3, "model": trained, "args": argparse.Namespace(lr=1)}, tmp_path / "more.pt")
    finally:
        kind.__module__ = name
        del main.Net  # type: ignore[attr-defined]
    sys.modules[name].Net = kind  # type: ignore[attr-defined]
    for file in ("whole.pt", "more.pt"):
        with pytest.raises(ExportError, match="--unsafe-pickle reads all of it"):
            load_weights(network, tmp_path / file)
        fresh, _ = build(f"{tmp_path / 'net.py'}:Net", {})
        load_weights(fresh, tmp_path / file, unsafe_pickle=True)
        assert torch.equal(fresh.weight, trained.weight), file
