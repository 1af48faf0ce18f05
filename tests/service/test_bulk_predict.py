"""`forwardpass predict` with more rows than one request takes, against a real server with small limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import numpy as np
import pytest

from forwardpass import Client
from forwardpass.cli.main import main
from forwardpass.testing.server_process import ServerProcess

Said = pytest.CaptureFixture[str]
ROWS = 5003
LIMITED = "max_request_rows = 100\nmax_batch_size = 32\n"
X = np.random.default_rng(0).standard_normal((ROWS, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("repository")
    models.save(root, "chain", models.chain(), LIMITED)
    models.save(root, "looked_up", models.table(), "max_batch_size = 32\n")
    models.save(root, "pair", models.two_by_two(), LIMITED)
    models.save(root, "words", models.echo(models.STRING, ("batch", 1)), LIMITED)
    models.save(root, "mixed", models.centred(), "max_batch_size = 32\n")
    with ServerProcess(root, "--max-message-bytes", "40000") as running:
        yield running
        assert running.stop() == 0, running.tail()


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> np.ndarray:
    with Client(server.address) as client:
        return np.concatenate([client.predict("chain", X[i : i + 50]) for i in range(0, ROWS, 50)])


def predict(server: ServerProcess, *arguments: str) -> int:
    return main(["predict", *arguments, "--server", server.address])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("in_flight", ["1", "7"])
def test_more_rows_than_a_request_takes(
    server: ServerProcess, expected: np.ndarray, tmp_path: Path, capsys: Said, order: str, in_flight: str
) -> None:
    np.save(tmp_path / "x.npy", np.array(X.astype(np.float64), order=order))
    out = tmp_path / "y.npy"
    assert (
        predict(server, "chain", "--input", str(tmp_path / "x.npy"), "--save", str(out), "--in-flight", in_flight) == 0
    )
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)
    assert np.load(out, mmap_mode="r").dtype == np.float32
    said = capsys.readouterr()
    assert f"wrote {out}: y [{ROWS}, 3], from chain version 1" in said.out
    assert said.err == ""  # progress is for terminals
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_csv_in_and_every_format_out(server: ServerProcess, expected: np.ndarray, tmp_path: Path, suffix: str) -> None:
    rows = np.tile(X, (8, 1))  # more than is read at once
    np.savetxt(tmp_path / "x.csv", rows, delimiter=",", fmt="%.9g", header="a,b,c,d", comments="")
    out = tmp_path / f"y{suffix}"
    assert predict(server, "chain", "--input", f"x={tmp_path / 'x.csv'}", "--save", str(out)) == 0
    if suffix == ".csv":
        lines = out.read_text().splitlines()
        assert lines[0] == "y_0,y_1,y_2"
        found = np.array([line.split(",") for line in lines[1:]]).astype(np.float32)
    else:
        found = np.load(out) if suffix == ".npy" else np.load(out)["y"]
    np.testing.assert_allclose(found, np.tile(expected, (8, 1)), rtol=1e-5, atol=1e-6)


def test_a_table_of_many_rows(server: ServerProcess, tmp_path: Path, capsys: Said) -> None:
    np.save(tmp_path / "x.npy", X)
    assert predict(server, "chain", "--input", str(tmp_path / "x.npy")) == 0
    out = capsys.readouterr().out
    assert f"y float32 [{ROWS}, 3]" in out and f"… {ROWS - 20} more rows" in out


def test_several_inputs_and_outputs(server: ServerProcess, tmp_path: Path, capsys: Said) -> None:
    a, n = np.arange(3 * 700, dtype=np.float32).reshape(700, 3), np.arange(700)[:, np.newaxis]
    np.save(tmp_path / "a.npy", a)
    np.savetxt(tmp_path / "n.csv", n, fmt="%d")
    given = ["--input", f"a={tmp_path / 'a.npy'}", "--input", f"n={tmp_path / 'n.csv'}"]
    assert predict(server, "pair", *given, "--save", str(tmp_path / "y.npz")) == 0
    with np.load(tmp_path / "y.npz") as found:
        np.testing.assert_array_equal(found["sum"], a + n)
        assert found["most"].shape == (700,)
    np.save(tmp_path / "a.npy", a[:-1])
    assert predict(server, "pair", *given, "--save", str(tmp_path / "z.npz")) == 1
    assert "inputs differ in their number of rows: 'a' ends after 699, others go on" in capsys.readouterr().err
    assert not (tmp_path / "z.npz").exists()


def test_texts_with_line_breaks(server: ServerProcess, tmp_path: Path) -> None:
    words = "".join(f'"grün\n{i}"\n' for i in range(5000))
    (tmp_path / "w.csv").write_text(words)
    assert predict(server, "words", "--input", str(tmp_path / "w.csv"), "--save", str(tmp_path / "y.csv")) == 0
    assert (tmp_path / "y.csv").read_text() == "y_0\n" + words


def test_an_error_names_the_rows_and_keeps_those_before(server: ServerProcess, tmp_path: Path, capsys: Said) -> None:
    x = np.arange(20_000) % 8
    x[12_345] = 99
    np.save(tmp_path / "x.npy", x[:, np.newaxis])
    out = tmp_path / "y.npy"
    given = ["looked_up", "--input", str(tmp_path / "x.npy"), "--save", str(out), "--chunk-rows", "1000"]
    assert predict(server, *given) == 1
    said = capsys.readouterr().err
    assert "rows 12000 to 12999: " in said and "y.npy.partial has the 12000 rows before" in said
    assert not out.exists()
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy.partial")[:, 0], x[:12_000] * 10)


def test_a_wrong_cell_is_named_wherever_it_is(server: ServerProcess, tmp_path: Path, capsys: Said) -> None:
    lines = ["1,2,3,4"] * 300_000
    lines[299_000] = "1,2,x,4"
    (tmp_path / "x.csv").write_text("\n".join(lines))
    assert predict(server, "chain", "--input", str(tmp_path / "x.csv"), "--save", str(tmp_path / "y.csv")) == 1
    assert "x.csv, line 299001, cell 3: expected a number, got 'x'" in capsys.readouterr().err


def test_rows_that_depend_on_each_other_are_not_parted(server: ServerProcess, tmp_path: Path, capsys: Said) -> None:
    np.save(tmp_path / "x.npy", np.ones((ROWS, 4), np.float32))
    assert predict(server, "mixed", "--input", str(tmp_path / "x.npy")) == 1
    assert "the message has" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(server: ServerProcess, tmp_path: Path) -> None:
    peak = {rows: _peak(server, tmp_path, rows) for rows in (20_000, 1_000_000)}
    assert peak[1_000_000] - peak[20_000] < 24 << 20, peak


def _peak(server: ServerProcess, folder: Path, rows: int) -> int:
    """The most memory that a process takes for so many rows: of 16 MB, and with answers of 12 MB, for a million."""
    x, y = folder / f"x{rows}.npy", folder / f"y{rows}.npy"
    np.save(x, np.tile(X[:1000], (rows // 1000, 1)))
    code = (
        "import re, sys; from forwardpass.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    arguments = ["predict", "chain", "--input", str(x), "--save", str(y), "--server", server.address]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.load(y, mmap_mode="r").shape == (rows, 3)
    return int(done.stdout.split()[-1]) * 1024
