"""What a repository holds on disk, in every layout that models come in, and what counts as a change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from forwardpass.errors import ConfigError, ModelError, SettingsError
from forwardpass.model.options import ModelConfig
from forwardpass.repository.model_folder import ModelFolder, find


def put(folder: Path, *files: str) -> Path:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file)
    return folder


def present(root: Path, name: str = "") -> list[tuple[str, list[int]]]:
    """Name and versions of each model that is there."""
    return [(h.name, list(h.versions("model.onnx"))) for h in find(root, name) if h.present()]


def test_a_tree_of_models(tmp_path: Path) -> None:
    put(
        tmp_path,
        "b/2/model.onnx", "b/10/model.onnx", "b/1/notes.txt", "b/03/model.onnx", "b/x/model.onnx", "b/0/model.onnx",
        "a/1/model.onnx", "no_versions/model.toml", ".hidden/1/model.onnx", "__pycache__/1/model.onnx", "file",
    )  # fmt: skip
    (tmp_path / "no_versions" / "model.toml").write_text("max_batch_size = 4")
    assert present(tmp_path) == [("a", [1]), ("b", [2, 10])]


def test_one_models_own_folder(tmp_path: Path) -> None:
    mounted = put(tmp_path / "models", "1/model.onnx", "2/model.onnx")
    assert present(mounted) == [("models", [1, 2])]
    assert present(mounted, "told") == [("told", [1, 2])]
    (mounted / "config.pbtxt").write_text('name: "said"')
    assert present(mounted) == [("said", [1, 2])]
    assert present(mounted, "told") == [("told", [1, 2])]
    (model_folder,) = find(mounted, "told")
    assert model_folder.config().origin.given.name == "said"  # the folder has no name to hold it against


def test_one_version_in_the_models_own_folder(tmp_path: Path) -> None:
    mounted = put(tmp_path / "m", "model.onnx")
    (model_folder,) = find(mounted)
    assert model_folder.versions("model.onnx") == {1: mounted}
    put(mounted, "7/model.onnx")  # folders of versions come before it
    assert list(model_folder.versions("model.onnx")) == [7]


def test_folders_of_links_as_kubernetes_mounts_them(tmp_path: Path) -> None:
    put(tmp_path, "..2024/1/model.onnx", "..2024/config.pbtxt")
    (tmp_path / "..2024" / "config.pbtxt").write_text("max_batch_size: 4")
    (tmp_path / "..data").symlink_to("..2024")
    for name in ("1", "config.pbtxt"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    (model_folder,) = find(tmp_path)
    assert list(model_folder.versions("model.onnx")) == [1]
    assert model_folder.config().max_batch_size == 4
    before = model_folder.state()
    shutil.copytree(tmp_path / "..2024", tmp_path / "..2025")
    (tmp_path / "..next").symlink_to("..2025")
    (tmp_path / "..next").replace(tmp_path / "..data")  # how a kubelet turns to a new state of the volume
    assert model_folder.anew().state() != before


def test_the_networks_file_may_have_another_name(tmp_path: Path) -> None:
    put(tmp_path, "m/1/net.onnx", "m/2/model.onnx")
    (tmp_path / "m" / "config.pbtxt").write_text('default_model_filename: "net.onnx"')
    (model_folder,) = find(tmp_path)
    assert model_folder.present() and list(model_folder.chosen(model_folder.config())) == [1]


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [(1, [10]), (2, [3, 10]), (9, [1, 3, 10]), ("all", [1, 3, 10]), ([10, 1], [1, 10])],
)
def test_version_policies_choose(tmp_path: Path, versions: object, chosen: list[int]) -> None:
    model_folder = ModelFolder("m", put(tmp_path, "1/model.onnx", "3/model.onnx", "10/model.onnx"))
    assert list(model_folder.chosen(ModelConfig(versions=versions))) == chosen  # type: ignore[arg-type]


def test_versions_that_are_not_there_are_told(tmp_path: Path) -> None:
    model_folder = ModelFolder("m", put(tmp_path, "1/model.onnx", "3/model.onnx"))
    with pytest.raises(ModelError, match="there is no version 2; there are 1, 3"):
        model_folder.chosen(ModelConfig(versions=[1, 2]))
    with pytest.raises(ModelError, match=r"there is no version: expected .*/VERSION/net.onnx"):
        model_folder.chosen(ModelConfig(model_file="net.onnx"))


def test_options_come_from_one_file(tmp_path: Path) -> None:
    model_folder = ModelFolder(tmp_path.name, tmp_path)
    assert model_folder.config() == ModelConfig()
    (tmp_path / "model.toml").write_text("max_batch_size = 3")
    assert model_folder.anew().config().max_batch_size == 3
    (tmp_path / "config.pbtxt").write_text("max_batch_size: 4")
    with pytest.raises(ConfigError, match=r"has model\.toml and config\.pbtxt; expected one of them"):
        model_folder.anew().config()
    assert model_folder.anew().present()  # there is something to complain of
    (tmp_path / "model.toml").unlink()
    assert model_folder.anew().config().max_batch_size == 4
    (tmp_path / "config.pbtxt").write_text('name: "other"')
    with pytest.raises(ConfigError, match=r"expected '.*', as the folder is called, got 'other'"):
        model_folder.anew().config()


def test_a_repository_must_be_a_folder(tmp_path: Path) -> None:
    for root in (tmp_path / "nothing", put(tmp_path, "file") / "file"):
        with pytest.raises(SettingsError, match="is not a folder"):
            find(root)


def test_what_counts_as_a_change(tmp_path: Path) -> None:
    model_folder = ModelFolder(
        "m", put(tmp_path / "m", "1/model.onnx", "2/model.onnx", "labels.txt", "README", "warmup/x.raw")
    )
    known = model_folder.state()

    def changed() -> bool:
        nonlocal known
        before, known = known, model_folder.anew().state()
        return before != known

    assert not changed()
    (model_folder.folder / "README").write_text("something else")
    assert not changed()
    (model_folder.folder / "1" / "model.onnx").write_text("not the latest")
    assert not changed()
    (model_folder.folder / "2" / "model.onnx").write_text("another network")
    assert changed()
    os.utime(model_folder.folder / "2" / "model.onnx", ns=(1, 1))
    assert changed()
    (model_folder.folder / "2" / "weights.bin").write_text("beside it")
    assert changed()
    (model_folder.folder / "2" / "deep").mkdir()
    assert changed()
    (model_folder.folder / "2" / "deep" / "ring").symlink_to("..")  # a ring of links ends
    assert changed()
    (model_folder.folder / "model.toml").write_text('labels = "labels.txt"')
    assert changed()
    (model_folder.folder / "labels.txt").write_text("a\nb")
    assert changed()
    (model_folder.folder / "model.toml").write_text("not TOML")
    assert changed()
    (model_folder.folder / "model.toml").unlink()
    put(model_folder.folder, "3/model.onnx")
    assert changed()
    shutil.rmtree(model_folder.folder)
    assert changed()
