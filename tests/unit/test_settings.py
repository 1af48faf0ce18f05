"""Settings: one field, one spelling everywhere; the command line before the environment before the default."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from forwardpass.errors import SettingsError
from forwardpass.settings import PREFIX, Settings, add_arguments, from_sources, table


def parsed(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(list(arguments)))


def test_the_command_line_comes_before_the_environment_before_the_default() -> None:
    environ = {"FORWARDPASS_GRPC_PORT": "1", "FORWARDPASS_HOST": "0.0.0.0", "FORWARDPASS_GRACE": ""}
    found = from_sources(parsed("--grpc-port", "2"), environ)
    assert (found.grpc_port, found.host, found.grace) == (2, "0.0.0.0", 20.0)
    assert from_sources({}, {}) == Settings()


def test_a_file_comes_after_the_environment_and_before_the_default(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'grpc_port = 1\nhttp_port = 2\nhost = "::"\nmodel_control = "explicit"\nload_model = ["a", "b"]\n'
        "reflection = true\ngrace = 3\n"
    )
    environ = {"FORWARDPASS_HTTP_PORT": "22", "FORWARDPASS_GRPC_PORT": "11"}
    found = from_sources(parsed("--config", str(file), "--grpc-port", "111"), environ)
    assert (found.grpc_port, found.http_port, found.host) == (111, 22, "::")
    assert (found.load_model, found.reflection, found.grace, found.metrics_port) == (("a", "b"), True, 3.0, 8002)
    assert from_sources({}, {"FORWARDPASS_CONFIG": str(file)}).host == "::"
    other = tmp_path / "other.toml"
    other.write_text("")
    assert from_sources(parsed("--config", str(other)), {"FORWARDPASS_CONFIG": str(file)}) == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grpc_prot = 1", ["serve.toml: grpc_prot is no setting; is grpc_port meant?"]),
        ("grpc-port = 1", ["serve.toml: grpc-port is no setting; is grpc_port meant?"]),
        ("zzz = 1", ["serve.toml: zzz is no setting; `forwardpass serve --help` lists them"]),
        ('config = "x.toml"', ["serve.toml: config is no setting"]),
        ("[serve]\ngrpc_port = 1", ["expected settings as NAME = VALUE at the top, got the table [serve]"]),
        ("grpc_port = 99999", ["serve.toml: grpc_port: ", "65535", "got 99999"]),
        ('reflection = "perhaps"', ["serve.toml: reflection: ", "'perhaps'"]),
        ("grpc_port", ["serve.toml: is not TOML: "]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        from_sources({"config": tmp_path / "serve.toml"}, {})
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file or directory"):
        from_sources({"config": tmp_path / "nowhere.toml"}, {})


def test_what_is_absent_on_the_command_line_stays_absent() -> None:
    assert parsed() == {}
    assert parsed("somewhere", "--instances", "3") == {"repository": "somewhere", "instances": "3"}


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--grpc-port", "many"], {}, ["--grpc-port", "'many'"]),
        (["--grpc-port", "65536"], {}, ["--grpc-port", "65535"]),
        ([], {"FORWARDPASS_RUN_TIMEOUT": "0"}, ["FORWARDPASS_RUN_TIMEOUT", "'0'"]),
        ([], {"FORWARDPASS_TRANSPORT": "carrier pigeon"}, ["FORWARDPASS_TRANSPORT", "'direct'", "'carrier pigeon'"]),
        (["--max-bytes", "1"], {"FORWARDPASS_GRACE": "-1"}, ["--max-bytes", "FORWARDPASS_GRACE"]),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_what_came(
    arguments: list[str], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        from_sources(parsed(*arguments), environ)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_choice_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("--transport", "carrier pigeon")
    assert "invalid choice" in capsys.readouterr().err


def test_every_setting_has_its_option_its_variable_and_its_line_in_the_table() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    help_text = re.sub(r"\s+", " ", parser.format_help())
    rows = table().splitlines()[2:]
    assert "`--config`" in rows[-1] and f"`{PREFIX}CONFIG`" in rows[-1] and "--config FILE" in help_text
    assert len(rows) == len(Settings.model_fields) + 1
    for (name, field), row in zip(Settings.model_fields.items(), rows[:-1], strict=True):
        option = "REPOSITORY" if name == "repository" else f"--{name.replace('_', '-')}"
        assert f"`{option}`" in row and f"`{PREFIX}{name.upper()}`" in row
        assert field.description and field.description in row
        assert name == "repository" or option in help_text
        assert f"{PREFIX}{name.upper()}" in help_text


def test_every_setting_can_be_set_by_its_variable() -> None:
    """Each default, as text, comes back as itself."""
    environ = {
        PREFIX + name.upper(): str(field.default)
        for name, field in Settings.model_fields.items()
        if isinstance(field.default, (bool, int, float, str, Path))
    }
    assert len(environ) > 15
    assert from_sources({}, environ) == Settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().grpc_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("1000", 1000), ("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("64MiB", 64 << 20), ("3k", 3000)],
)
def test_sizes_may_have_units(text: str, nbytes: int) -> None:
    assert from_sources({"cpu_memory": text}, {}).cpu_memory == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 gigs", "1e9", "2GiBB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--cpu-memory: .*500MB, 2GiB"):
        from_sources({"cpu_memory": text}, {})


def test_models_are_loaded_on_demand_by_one_process_and_alone_within_a_bound() -> None:
    given = {"model_control": "on-demand", "model_memory": "1GiB", "load_model": "a,b"}
    assert from_sources(given, {}).model_memory == 1 << 30
    with pytest.raises(SettingsError, match="processes"):
        from_sources(given | {"processes": "2"}, {})
    with pytest.raises(SettingsError, match="model-memory"):
        from_sources({"model_memory": "1GiB"}, {})
