"""The script for bash, sourced by a real bash, which is then asked what it would complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forwardpass.cli.main import COMMANDS, main

pytest.importorskip("shtab", reason="shtab is not installed (the extra completion)")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    line = [sys.executable, "-m", "forwardpass", "completion", "bash"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "script"
    path.write_text(done.stdout)
    return path


def completed(script: Path, folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("the shell bash is not installed")
    ask = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_forwardpass; '
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
    line = [bash, "--norc", "-c", ask, "bash", str(script), "forwardpass", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_commands_options_choices_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("")
    assert completed(script, tmp_path, "") >= COMMANDS.keys()
    assert completed(script, tmp_path, "rel") == {"reload"}
    assert completed(script, tmp_path, "serve", "--grpc-p") == {"--grpc-port"}
    assert "--tls-ca" in completed(script, tmp_path, "loadtest", "--tls")
    assert completed(script, tmp_path, "serve", "--transport", "d") == {"direct"}
    assert completed(script, tmp_path, "predict", "m", "--input", "ro") == {"rows.csv"}
    assert completed(script, tmp_path, "log-level", "w") == {"warning"}


def test_every_shell_gets_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "fish", "tcsh"):
        assert main(["completion", shell]) == 0
        assert "log-level" in capsys.readouterr().out


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "needs shtab, which is not installed: pip install 'forwardpass[completion]'" in capsys.readouterr().err
