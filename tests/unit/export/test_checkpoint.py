"""A network from a file and weights from another: what fits goes in, what does not is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

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
        (f"{NETWORKS}:Nothing", {}, "no class or function 'Nothing'"),
        (f"{NETWORKS}:Mlp", {"width": 3}, "Mlp(width=3) failed: TypeError"),
        (f"{NETWORKS}:Mlp", {"activation": "sine"}, "Mlp(activation='sine') failed: KeyError"),
        (f"{NETWORKS}:Path", {}, "no class or function 'Path'"),
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
