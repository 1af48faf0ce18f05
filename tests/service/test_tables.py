"""A table in, labels out: data frames, files with named columns and their errors, against a real server."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from models import cars

from forwardpass import AsyncClient, Client
from forwardpass.cli.main import main
from forwardpass.client import Coalesce, InvalidArgument, Ranked
from forwardpass.testing.server_process import ServerProcess

FRAME = pd.DataFrame(
    {
        "name": ["golf", "mustang", "mini"],
        "origin": ["Europe", "USA", "Europe"],
        "power": [1, 7, 2],
        "weight": [4, 2, 9],
    }
)
LOGITS = [[4, 1, 1], [2, 7, -2], [9, 2, -4]]
LABELS = ["low", "middle", "low"]
Said = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("cars")
    cars(repository)
    with ServerProcess(repository) as running:
        yield running


def test_a_data_frame_goes_in_and_labels_come_out(server: ServerProcess) -> None:
    with Client(server.address) as client, Client(server.address, coalesce=Coalesce()) as sharing:
        assert client.predict("cars", FRAME, output="logits").tolist() == LOGITS
        assert sharing.predict("cars", FRAME, output="logits").tolist() == LOGITS
        answer = client.infer("cars", FRAME)
        assert answer["seen"].tolist() == [["golf"], ["mustang"], ["mini"]]
        assert [row[0].label for row in answer.top()] == LABELS
        exact = np.exp([2.0, 7.0, -2.0]) / np.exp([2.0, 7.0, -2.0]).sum()
        first, second = answer.top(2)[1]
        assert (first, second) == (
            Ranked("middle", 7.0, pytest.approx(exact[1])),
            Ranked("low", 2.0, pytest.approx(exact[0])),
        )
        record = FRAME.to_dict("records")[1]
        assert client.predict("cars", record, output="logits").tolist() == LOGITS[1:2]
        with client.stream() as stream:
            assert stream.submit("cars", FRAME).result()["logits"].tolist() == LOGITS
        words = {"numbers": [[4.0, 1.0]], "origin": np.array(["Europe"]), "name": [["golf"]]}
        assert client.infer("cars", words)["logits"].tolist() == LOGITS[:1], "words are codes in an array, too"


def test_metadata_name_columns_and_categories(server: ServerProcess, capsys: Said) -> None:
    with Client(server.address) as client:
        numbers, origin, _ = client.metadata("cars").inputs
    assert numbers.labels == ("weight", "power") and origin.categories == ("USA", "Europe")
    assert main(["models", "--json", "--server", server.address]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model["inputs"][0]["labels"] == ["weight", "power"]
    assert model["inputs"][1]["categories"] == ["USA", "Europe"]


async def from_asyncio(address: str) -> list[list[float]]:
    async with AsyncClient(address) as client:
        found: list[list[float]] = (await client.predict("cars", FRAME, output="logits")).tolist()
        return found


def test_an_asyncio_client_takes_tables_too(server: ServerProcess) -> None:
    import asyncio

    assert asyncio.run(from_asyncio(server.address)) == LOGITS


def test_a_wrong_table_is_rejected_before_anything_is_sent(server: ServerProcess) -> None:
    with Client(server.address) as client:
        for frame, text in (
            (FRAME.rename(columns={"origin": "Origin"}), "is 'Origin' meant by 'origin'?"),
            (FRAME.assign(origin="Mars"), "column 'origin', row 0: expected one of 'USA', 'Europe', got 'Mars'"),
            (FRAME.assign(power=[1, None, 2]), "column 'power', row 1: expected a value, got NaN"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                client.predict("cars", frame, output="logits")
            assert text in str(caught.value)


def ask(server: ServerProcess, *arguments: object) -> int:
    return main(["predict", "cars", "--server", server.address, *map(str, arguments)])


def test_every_file_of_columns(
    server: ServerProcess, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra tables)")
    FRAME.to_csv(tmp_path / "cars.csv", index=False)
    FRAME.to_parquet(tmp_path / "cars.parquet")
    FRAME.to_json(tmp_path / "cars.json", orient="records")
    FRAME.to_json(tmp_path / "cars.jsonl", orient="records", lines=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO((tmp_path / "cars.json").read_text()))
    for given in (*(tmp_path / f"cars.{suffix}" for suffix in ("csv", "parquet", "json", "jsonl")), "-"):
        assert ask(server, "--input", given, "--json") == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["outputs"]["logits"] == LOGITS
    # In chunks, and in order.
    table = pd.concat([FRAME] * 700)
    table.to_csv(tmp_path / "many.csv", index=False)
    saved = tmp_path / "many.npy"
    assert ask(server, "--input", tmp_path / "many.csv", "--output", "logits", "--save", saved) == 0
    assert np.load(saved).tolist() == LOGITS * 700


def test_the_top_labels(server: ServerProcess, tmp_path: Path, capsys: Said) -> None:
    FRAME.to_csv(tmp_path / "cars.csv", index=False)
    assert ask(server, "--input", tmp_path / "cars.csv", "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cars version 1"
    assert lines[2].split() == ["row", "label_1", "probability_1", "label_2", "probability_2"]
    assert lines[4].split() == ["1", "middle", "0.9932", "low", "0.0067"]
    assert ask(server, "--input", tmp_path / "cars.csv", "--top", 1, "--no-softmax", "--json") == 0
    top = json.loads(capsys.readouterr().out)["top"]
    assert top == [[{"label": label, "value": max(row)}] for label, row in zip(LABELS, LOGITS, strict=True)]
    assert ask(server, "--input", tmp_path / "cars.csv", "--top", 1, "--save", tmp_path / "labels.csv") == 0
    assert pd.read_csv(tmp_path / "labels.csv")["label_1"].tolist() == LABELS
    assert ask(server, "--input", tmp_path / "cars.csv", "--top", 1, "--save", tmp_path / "labels.npy") == 1
    assert "--top writes labels to .csv or .json, got '.npy'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "a.csv",
            "weight,power,origin\n1,2,USA\n",
            "a.csv: model 'cars' takes the columns 'weight', 'power', 'origin'",
        ),
        (
            "a.csv",
            "1,2,3\n4,5,6\n",
            "a.csv: expected a first line with the names of the columns (weight, power, origin",
        ),
        ("a.csv", "weight,power,origin,name\n1,2,USA\n", "a.csv, line 2: has 3 cells; expected 4"),
        ("a.csv", "weight,power,origin,name\n1,2,USA,a\nb,2,USA,a\n", "a.csv, line 3: 'weight': expected a number"),
        ("a.csv", "weight,power,origin,name\n1,,USA,a\n", "a.csv, line 2: 'power': expected a number, got ''"),
        ("a.csv", "weight,power,origin,name\n1,2,Usa,a\n", "row 0: expected one of 'USA', 'Europe', got 'Usa'"),
        ("a.csv", "weight,power,origin,name,name\n1,2,USA,a,a\n", "different names, got 'name' more than once"),
        ("a.csv", "weight,power,origin,name\n", "a.csv: has no rows"),
        ("a.jsonl", '{"weight": 1}\n{', "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl: expected a JSON object in each line"),
        ("a.json", '[{"weight": 1, "power": 2, "origin": "USA"}]', "a.json: model 'cars' takes the columns"),
        ("a.parquet", "PAR", "a.parquet: is not Parquet"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(
    server: ServerProcess, tmp_path: Path, capsys: Said, name: str, content: str, text: str
) -> None:
    (tmp_path / name).write_text(content)
    assert ask(server, "--input", tmp_path / name) == 1
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == 1
