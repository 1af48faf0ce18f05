"""What clients, models and answers show in a notebook and in a traceback: their facts, escaped, and no chains."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from forwardpass.client import (
    AsyncClient,
    Client,
    Coalesce,
    InvalidArgument,
    ModelInfo,
    ModelState,
    TensorInfo,
    Tls,
    Unavailable,
)
from forwardpass.client.results import Answer, ModelList

NOWHERE = "127.0.0.1:1"
INFO = ModelInfo(
    "<b>m</b>",
    ("1", "2"),
    "onnx",
    (TensorInfo("x", "FP32", (-1, 2), labels=("<i>", "b")), TensorInfo("c", "INT64", (-1,), categories=("u", "v"))),
    (TensorInfo("logits", "FP32", (-1, 2), labels=("low", "high")), TensorInfo("words", "BYTES", (-1, 1))),
    {"max_batch_size": 8},
)


class Cells(HTMLParser):
    """The texts of a table's cells, by row; fails on a tag that stays open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.caption = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] == "caption":
            self.caption += data
        elif self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def answer(**arrays: np.ndarray) -> Answer:
    return Answer(arrays, INFO, INFO.name, "2", "", None)


def test_a_client_shows_its_facts_and_calls_nobody() -> None:
    client = Client(NOWHERE, token="secret", tls=Tls(), coalesce=Coalesce())
    assert repr(client) == f"<Client of {NOWHERE}, TLS, with a token>"
    facts = {row[0]: row[1] for row in Cells(client._repr_html_()).rows}
    assert facts["address"] == NOWHERE and facts["state"] == "connects with the first call"
    assert facts["time limit of a call"] == "30 s" and facts["rows that shared requests"] == "0 in 0"
    assert "secret" not in client._repr_html_() + repr(client)
    client.close()
    assert repr(client).endswith("closed>") and "closed" in client._repr_html_()
    assert repr(AsyncClient("a:1", timeout=None)) == "<AsyncClient of a:1>"


def test_a_model_shows_its_tensors() -> None:
    assert (
        repr(INFO) == "<Model '<b>m</b>', versions 1, 2: x FP32[?,2], c INT64[?] -> logits FP32[?,2], words BYTES[?,1]>"
    )
    cells = Cells(INFO._repr_html_())
    assert cells.caption == "<b>m</b>, versions 1, 2", "a name is text, not a tag"
    assert cells.rows[1] == ["input", "x", "FP32", "[?,2]", "<i>, b"]
    assert cells.rows[2] == ["input", "c", "INT64", "[?]", "u, v"]
    states = ModelList([ModelState("m", "1", "UNAVAILABLE", "<broken>")])
    assert Cells(states._repr_html_()).rows[1] == ["m", "1", "UNAVAILABLE", "<broken>"]


def test_an_answer_shows_its_first_rows_with_the_largest_label() -> None:
    logits = np.tile(np.array([[1.5, -2]], np.float32), (12, 1))
    logits[1] = [np.nan, 1]
    words = np.array([["<script>"]] * 12, object)
    cells = Cells(answer(logits=logits, words=words)._repr_html_())
    assert cells.rows[0] == ["row", "logits: largest", "low", "high", "words"]
    assert cells.rows[1] == ["0", "low", "1.5", "-2", "<script>"]
    assert cells.rows[2][1] == "NaN" and len(cells.rows) == 11
    wide = Cells(answer(logits=np.zeros((1, 40), np.float32), words=np.zeros((2, 2, 2)))._repr_html_())
    assert wide.rows[0][-2:] == ["… 24 more", "words float64[2, 2, 2]"]


def test_the_top_of_rows() -> None:
    found = answer(logits=np.array([[0, 0], [1, np.nan], [-1000, 1000]], np.float32)).top(5)
    assert [[(ranked.label, ranked.probability) for ranked in row] for row in found] == [
        [("low", 0.5), ("high", 0.5)],
        [],
        [("high", 1.0), ("low", 0.0)],
    ]
    given = Answer({"p": np.array([[0.25, 0.75]]), "s": np.array([[1.0, 3.0]])}, INFO, "m", "1", "", None)
    assert given.top(output="p") == [[("1", 0.75, 0.75)]], "probabilities are left as they are"
    assert given.top(output="s") == [[("1", 3.0, None)]]
    assert given.top(output="s", softmax=True)[0][0].probability == pytest.approx(np.e**2 / (1 + np.e**2))
    for wrong, text in (
        (lambda: given.top(), "gave p, s: name the output to rank"),
        (lambda: given.top(output="x"), "expected one of them, got x"),
        (lambda: given.top(0, output="p"), "k: expected at least 1, got 0"),
        (lambda: answer(words=np.array([["a"]], object)).top(), "expected rows of numbers to rank, got object"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            wrong()


async def awaited(**options: Any) -> None:
    async with AsyncClient(NOWHERE, attempts=1, timeout=5, **options) as client:
        await client.predict("m", np.zeros((1, 2)))


def streamed() -> None:
    with Client(NOWHERE, attempts=1, timeout=5) as client, client.stream() as stream:
        stream.submit("m", np.zeros((1, 2))).result()


X = np.zeros((1, 2))
FAILING: dict[str, Callable[[], object]] = {
    "predict": lambda: Client(NOWHERE, attempts=1).predict("m", X),
    "infer": lambda: Client(NOWHERE, attempts=1).infer("m", X),
    "models": lambda: Client(NOWHERE, attempts=1).models(),
    "again": lambda: Client(NOWHERE, attempts=2).models(),
    "coalesced": lambda: Client(NOWHERE, attempts=1, coalesce=Coalesce()).predict("m", X),
    "stream": streamed,
    "async": lambda: asyncio.run(awaited()),
    "async, coalesced": lambda: asyncio.run(awaited(coalesce=Coalesce())),
}


@pytest.mark.parametrize("way", FAILING)
def test_a_failed_call_is_a_short_traceback_without_grpc(way: str) -> None:
    with pytest.raises(Unavailable) as caught:
        FAILING[way]()
    text = "".join(traceback.format_exception(caught.value))
    assert "During handling" not in text and "direct cause" not in text and "_InactiveRpcError" not in text
    library = [
        frame for frame in traceback.extract_tb(caught.value.__traceback__) if "forwardpass/client" in frame.filename
    ]
    assert len(library) <= 3, "the operation and what runs it"
