"""What is remembered of one message must never change what is read from another: a full parse is the measure."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.serving.made import Target, interface, message, tensor

from forwardpass.errors import RequestError, UnknownModel
from forwardpass.serving import protocol
from forwardpass.serving.wire import KNOWN_HEADERS, KNOWN_PER_LENGTH, KNOWN_PREFIX, Decoder, varint

LIMIT = 1 << 20


class Models:
    """A table of models with a generation, as the repository has them."""

    def __init__(self) -> None:
        two = interface([tensor("x", "FP32", -1, 2), tensor("n", "INT64", -1)], [tensor("y", "FP32", -1, 2)])
        self.generation = 0
        self.asked = 0
        self.table = {
            "m": Target(interface(), rows=1 << 16),
            "w": Target(interface([tensor("x", "FP32", -1, -1)]), "w"),
            "i": Target(interface([tensor("x", "INT8", -1, 2)]), "i"),
            "s": Target(interface([tensor("x", "BYTES", -1, 1)]), "s"),
            "two": Target(two, "two"),
        }

    def resolve(self, name: str, version: str) -> Target:
        self.asked += 1
        if name not in self.table or version not in ("", "1"):
            raise UnknownModel(name)
        return self.table[name]


def decoder(models: Models | None = None) -> Decoder:
    return Decoder(models or Models(), LIMIT)


def reading(from_: Decoder, data: bytes) -> Any:
    """All that a decoder says of a message: its header and tensors, or its refusal."""
    try:
        header, buffers = from_.decode(data)
    except RequestError as error:
        return type(error), str(error)
    told = (header.target.name, header.rows, header.batch_shapes, header.signature, header.outputs, header.id)
    return told, header.priority, header.timeout, [bytes(b) for b in buffers]


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(name: str, datatype: str, *shape: int) -> bytes:
    return protocol.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape).SerializeToString()


# Pieces of messages, sound and not: put together in any order, they make what a client may send.
PIECES = [
    field(1, b"m"),
    field(1, b"w"),
    field(1, b"i"),
    field(1, b"s"),
    field(2, b"1"),
    field(3, b"id"),
    field(5, entry("x", "FP32", 1, 2)),
    field(5, entry("x", "FP32", 2, 1)),
    field(5, entry("x", "INT8", 4, 2)),
    field(5, entry("x", "BYTES", 1, 1)),
    field(6, protocol.ModelInferRequest.InferRequestedOutputTensor(name="y").SerializeToString()),
    field(7, b"AAAABBBB"),
    field(7, b"CCCCDDDD"),
    field(7, b"\x04\0\0\0text"),
    field(7, b"\x05\0\0\0text"),
    field(100, b"unknown"),
    field(100, field(7, b"EEEEFFFF")),  # reads like a tensor where one would look for it
    field(100, field(7, b"GGGGHHHH")),
    varint(101 << 3 | 3) + field(7, b"IIIIJJJJ") + varint(101 << 3 | 4),  # a group with one in it
    b"",
]
good = field(1, b"m") + field(5, entry("x", "FP32", 1, 2))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map(b"".join), min_size=1, max_size=5))
@example([good + field(7, b"AAAABBBB"), good + field(7, b"CCCCDDDD")])
@example([good + field(7, b"AAAABBBB") + field(100, field(7, b"EEEEFFFF"))] * 2)
def test_a_decoder_with_a_past_reads_as_one_without(messages: list[bytes]) -> None:
    used = decoder()
    for data in [*messages, *messages]:
        assert reading(used, data) == reading(decoder(), data)


@pytest.mark.parametrize(
    "disguise",
    [
        lambda inner: field(100, inner),
        lambda inner: field(4, field(1, b"k") + field(2, field(3, inner))),  # a parameter's text
        lambda inner: varint(101 << 3 | 3) + inner + varint(101 << 3 | 4),
        lambda inner: field(15, inner[2:]),  # of the very size of a tensor's field, under another number
    ],
    ids=["unknown field", "parameter", "group", "other number"],
)
def test_what_only_reads_like_a_tensor_is_none(disguise: Any) -> None:
    used = decoder()
    real = good + field(7, b"AAAABBBB")
    assert reading(used, real + disguise(field(7, b"AAAABBBB")))[-1] == [b"AAAABBBB"]
    assert reading(used, real + disguise(field(7, b"EEEEFFFF")))[-1] == [b"AAAABBBB"]


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 5), st.booleans(), st.integers(0, 1 << 30))
def test_whatever_happens_to_a_known_message_is_seen(rows: int, named: bool, seed: int) -> None:
    rng = random.Random(seed)
    x = np.frombuffer(rng.randbytes(8 * rows), "<f4").reshape(rows, 2)
    known = message([("x", x)], outputs=["y"] if named else []).SerializeToString()
    used = decoder()
    reading(used, known)
    for _ in range(8):
        data = bytearray(known)
        place = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.randrange(256)
            case 2:
                del data[place:]
            case 3:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                data += rng.choice(PIECES)
        assert reading(used, bytes(data)) == reading(decoder(), bytes(data))


def test_every_byte_before_the_tensor_counts() -> None:
    known = message([("x", np.ones((2, 2), np.float32))], outputs=["y"]).SerializeToString()
    for place in range(len(known)):
        for bit in range(8):
            used = decoder()
            reading(used, known)
            data = bytearray(known)
            data[place] ^= 1 << bit
            assert reading(used, bytes(data)) == reading(decoder(), bytes(data))


def test_a_known_message_is_not_parsed_again() -> None:
    models = Models()
    used = decoder(models)
    headers = set()
    for value in range(10):
        data = message([("x", np.full((3, 2), value, np.float32))]).SerializeToString()
        header, (buffer,) = used.decode(data)
        headers.add(header)
        assert np.array_equal(np.frombuffer(buffer, "<f4"), np.full(6, value))
    assert len(headers) == 1 and models.asked == 1


@pytest.mark.parametrize("rows", [1, 511, 512, 5000])
@pytest.mark.parametrize("padding", range(4))
def test_small_tensors_are_copied_and_large_ones_looked_at(rows: int, padding: int) -> None:
    # Either way the bytes are those sent, wherever in the message they start.
    used = decoder()
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((rows, 2)).astype(np.float32)
        data = field(100, b"." * padding) + message([("x", x)]).SerializeToString()
        _, (buffer,) = used.decode(data)
        assert bytes(buffer) == x.tobytes()
        assert np.array_equal(np.frombuffer(buffer, "<f4").reshape(rows, 2), x)


@pytest.mark.parametrize(
    "sent",
    [
        message([("x", np.ones((1, 2), np.float32))], id="7"),
        message([("x", np.ones((1, 2), np.float32))], typed=True),
        message([("x", np.ones((0, 2), np.float32))]),
        message([("x", np.array([["text"]], object))], model_name="s"),
        message([("x", np.ones((1, 2), np.float32)), ("n", np.ones(1, np.int64))], model_name="two"),
    ],
    ids=["with an id", "typed", "empty", "text", "two inputs"],
)
def test_what_is_not_remembered_is_parsed_every_time(sent: Any) -> None:
    models = Models()
    used = decoder(models)
    first, second = reading(used, sent.SerializeToString()), reading(used, sent.SerializeToString())
    assert first == second and not isinstance(first[0], type)
    assert models.asked == 2


def test_each_text_is_looked_at() -> None:
    used = decoder()
    sound = field(1, b"s") + field(5, entry("x", "BYTES", 1, 1)) + field(7, b"\x04\0\0\0text")
    assert reading(used, sound)[-1] == [b"\x04\0\0\0text"]
    for bad in (b"\x05\0\0\0text", b"\x00\0\0\0\x00\0\0\0", b"\x04\0\0\0\xff\xff\xff\xff"):
        kind, text = reading(used, sound[:-8] + bad)
        assert kind.__name__ == "InvalidRequest" and "input 'x'" in text


def test_a_swapped_model_is_forgotten() -> None:
    models = Models()
    used = decoder(models)
    data = message([("x", np.ones((1, 2), np.float32))]).SerializeToString()
    old = used.decode(data)[0].target
    models.table["m"] = Target(interface(), version="2")
    used.refresh()
    assert used.decode(data)[0].target is old  # nobody said that something changed
    models.generation += 1
    used.refresh()
    assert used.decode(data)[0].target is models.table["m"]


def test_memory_is_bounded_by_count_and_by_size() -> None:
    used = decoder()
    for i in range(3 * KNOWN_HEADERS):  # all lengths differ
        parameter = field(4, field(1, b"k" * (i % 2000 + 1)))
        reading(used, parameter + good + field(7, b"AAAABBBB"))
    for i in range(200):  # one length
        reading(used, field(4, field(1, b"%04d" % i)) + good + field(7, b"AAAABBBB"))
    for i in range(50):  # large
        reading(used, field(4, field(1, b"%06d" % i * KNOWN_PREFIX)) + good + field(7, b"AAAABBBB"))
    kept = [header for headers in used._known.values() for header in headers]
    assert 0 < len(kept) <= KNOWN_HEADERS
    assert used._count == len(kept)
    assert max(len(header.prefix) for header in kept) <= KNOWN_PREFIX
    assert max(map(len, used._known.values())) <= KNOWN_PER_LENGTH


def test_many_messages_of_one_length_do_not_push_out_those_of_others() -> None:
    models = Models()
    used = decoder(models)
    favourite = message([("x", np.ones((7, 2), np.float32))]).SerializeToString()
    reading(used, favourite)
    for i in range(100):
        reading(used, field(4, field(1, b"%04d" % i)) + good + field(7, b"AAAABBBB"))
    asked = models.asked
    reading(used, favourite)
    assert models.asked == asked
