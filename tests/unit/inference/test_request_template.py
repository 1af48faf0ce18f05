"""What is remembered of one message must never change what is read from another: a full parse is the measure."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.unit.made import Target, message, signature, tensor

from forwardpass import protocol
from forwardpass.errors import RequestError, UnknownModel
from forwardpass.inference.decoder import KNOWN_REPLIES, Decoder
from forwardpass.inference.request_template import (
    KNOWN_AT_ONCE,
    KNOWN_BYTES,
    KNOWN_LAYOUTS,
    KNOWN_LONGEST,
    KNOWN_TEMPLATES,
    RARELY,
)
from forwardpass.protocol.wire import varint

LIMIT = 1 << 20
LONG_P, LONG_Q = "n" * 199 + "p", "m" * 199 + "p"  # names whose lengths take two bytes, and end like a field's tag


class Models:
    """A table of models with a generation, as the repository has them."""

    def __init__(self) -> None:
        two = signature([tensor("x", "FP32", -1, 2), tensor("n", "FP64", -1)], [tensor("y", "FP32", -1, 2)])
        self.generation = 0
        self.asked = 0
        self.table = {
            "m": Target(signature(), rows=1 << 16),
            "w": Target(signature([tensor("x", "FP32", -1, -1)]), "w"),
            "i": Target(signature([tensor("x", "INT8", -1, 2)]), "i"),
            "s": Target(signature([tensor("x", "BYTES", -1, 1)]), "s"),
            "b": Target(signature([tensor("x", "BOOL", -1, 2)]), "b"),
            "l": Target(signature([tensor("x", "INT64", -1, 2)]), "l"),
            "two": Target(two, "two"),
            LONG_P: Target(signature(), LONG_P),
            LONG_Q: Target(signature([tensor("x", "FP32", -1, -1)]), LONG_Q),
        }

    def resolve(self, name: str, version: str) -> Target:
        self.asked += 1
        if name not in self.table or version not in ("", "1"):
            raise UnknownModel(name)
        return self.table[name]


def decoder(models: Models | None = None) -> Decoder:
    return Decoder(models or Models(), LIMIT)


def reading(from_: Decoder, data: bytes) -> Any:
    """All that a decoder says of a message: its template, tensors and id, or its refusal."""
    try:
        template, buffers, id_field = from_.decode(data)
    except RequestError as error:
        return type(error), str(error)
    told = (template.target.name, template.rows, template.batch_shapes, template.stack_key, template.outputs)
    # What is spliced into the answer must be what protobuf would write there.
    request_id = protocol.ModelInferResponse.FromString(id_field).id
    assert id_field == protocol.ModelInferResponse(id=request_id).SerializeToString()
    return told, template.priority, template.timeout, request_id, [bytes(b) for b in buffers]


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(name: str, datatype: str, *shape: int) -> bytes:
    return protocol.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape).SerializeToString()


def typed(name: str, datatype: str, contents: bytes, *shape: int) -> bytes:
    return field(5, entry(name, datatype, *shape) + field(5, contents))


# Pieces of messages, sound and not: put together in any order, they make what a client may send.
IDS = [
    field(3, b"id"),
    field(3, b"other"),
    field(3, b""),
    field(3, "\u00e9\u00e8".encode()),
    field(3, b"\xff"),
    field(3, b"\xed\xa0\x80"),  # a surrogate
    field(3, b"\xc0\x80"),  # more bytes than it takes
    field(3, b"i" * 127),
    field(3, b"i" * 128),
    field(3, b"i" * 1024),
    field(3, b"i" * 1025),
    field(3, "\u00e9".encode() * 600),
    field(3, field(7, b"AAAABBBB")),
    field(3, field(1, b"w")),
    b"\x1a\x82\x00id",  # its length in two bytes
    b"\x1a\x7f",  # cut off, or the beginning of something else
    b"\x9a\x00\x02id",  # its tag in two bytes
    varint(3 << 3) + b"\x05",  # a number
]
PIECES = [
    field(1, b"m"),
    field(1, b"w"),
    field(1, b"i"),
    field(1, b"s"),
    field(1, b"b"),
    field(1, b"two"),
    field(1, LONG_P.encode()),
    field(1, LONG_Q.encode()),
    field(2, b"1" * 200),
    field(2, b"1"),
    *IDS,
    field(4, field(1, b"timeout") + field(2, b"\x10\x05")),
    field(5, entry("x", "FP32", 1, 2)),
    field(5, entry("x", "FP32", 2, 1)),
    field(5, entry("x", "INT8", 4, 2)),
    field(5, entry("x", "BYTES", 1, 1)),
    field(5, entry("n", "FP64", 1)),
    typed("x", "FP32", field(6, b"AAAABBBB"), 1, 2),
    typed("x", "FP32", field(6, b"CCCCDDDD"), 1, 2),
    typed("x", "FP32", field(6, b"CCCC") + field(6, b"DDDD"), 1, 2),
    typed("x", "FP32", b"\x35AAAA\x35BBBB", 1, 2),
    typed("x", "FP32", field(6, b"AAAABBBB") + field(100, b"unknown"), 1, 2),
    field(5, entry("x", "FP32", 1, 2) + field(5, field(6, b"AAAA")) + field(5, field(6, b"BBBB"))),
    typed("n", "FP64", field(7, b"AAAABBBB"), 1),
    typed("x", "BOOL", field(1, b"\0\1"), 1, 2),
    typed("x", "BOOL", field(1, b"\2\1"), 1, 2),
    typed("x", "BOOL", field(1, b"\x81\0\1"), 1, 2),  # two elements in three bytes
    typed("x", "BOOL", field(1, b"\0\1\1"), 1, 2),
    typed("x", "INT8", field(2, b"\5\x7f"), 1, 2),
    typed("x", "INT8", field(2, b"\x85\1"), 1, 2),
    field(6, protocol.ModelInferRequest.InferRequestedOutputTensor(name="y").SerializeToString()),
    field(7, b"AAAABBBB"),
    field(7, b"CCCCDDDD"),
    field(7, b"\x04\0\0\0text"),
    field(7, b"\x05\0\0\0text"),
    field(100, b"unknown"),
    field(100, field(7, b"EEEEFFFF")),  # reads like a tensor where one would look for it
    field(100, field(7, b"GGGGHHHH")),
    varint(101 << 3 | 3) + field(7, b"IIIIJJJJ") + varint(101 << 3 | 4),  # a group with one in it
    varint(102 << 3 | 5) + b"1234",
    varint(103 << 3 | 1) + b"12345678",
    b"",
]
good = field(1, b"m") + field(5, entry("x", "FP32", 1, 2))
X, N = np.ones((1, 2), np.float32), np.ones(1)
# Messages that are remembered: whatever their ids and the elements of their tensors.
KINDS: dict[str, Any] = {
    "raw": ("x", {}),
    "raw, outputs named": ("x", {"outputs": ["y"], "model_version": "1"}),
    "typed": ("x", {"typed": True}),
    "typed, outputs named": ("x", {"typed": True, "outputs": ["y"]}),
    "bool, typed": ("x", {"typed": True, "model_name": "b"}),
    "int8, typed": ("x", {"typed": True, "model_name": "i"}),
    "two": ("xn", {"model_name": "two"}),
    "two the other way round, typed": ("nx", {"typed": True, "outputs": ["y"], "model_name": "two"}),
}


def of_kind(kind: str, x: NDArray[Any], n: NDArray[Any], request_id: str) -> bytes:
    names, more = KINDS[kind]
    if kind == "bool, typed":
        x = x > 0
    elif kind == "int8, typed":
        x = np.abs(x).clip(0, 9).astype(np.int8)
    arrays = {"x": x, "n": n}
    sent: bytes = message([(name, arrays[name]) for name in names], id=request_id, **more).SerializeToString()
    return sent


@settings(max_examples=400)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map(b"".join), min_size=1, max_size=5))
@example([good + field(7, b"AAAABBBB"), good + field(7, b"CCCCDDDD")])
@example([good + field(3, b"id") + field(7, b"AAAABBBB"), field(1, b"m") + field(3, b"other") + good[3:]])
@example(
    [field(1, n.encode()) + b"\x79" + b"\x78\x01" * 4 + good[3:] + field(7, b"AAAABBBB") for n in (LONG_P, LONG_Q)]
)
@example([field(1, b"m") + i + good[3:] + field(3, b"") + field(7, b"AAAABBBB") for i in (b"", field(3, b"id"))])
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


@settings(max_examples=600)
@given(
    st.lists(st.sampled_from(PIECES), max_size=3).map(b"".join),
    st.lists(st.tuples(st.sampled_from(["raw", "typed"]), st.binary(min_size=8, max_size=8)), min_size=2, max_size=5),
    st.lists(st.sampled_from([b"", *IDS]) | st.text(max_size=200).map(lambda t: field(3, t.encode())), min_size=5),
    st.sampled_from([b"", *PIECES]),
)
def test_any_id_and_any_tensor_read_as_in_a_full_parse(
    middle: bytes, tensors: list[tuple[str, bytes]], ids: list[bytes], end: bytes
) -> None:
    used = decoder()
    for (how, data), request_id in zip(tensors, ids, strict=False):
        if how == "raw":
            sent = field(1, b"m") + request_id + middle + good[3:] + field(7, data) + end
        else:
            sent = field(1, b"m") + request_id + middle + typed("x", "FP32", field(6, data), 1, 2) + end
        assert reading(used, sent) == reading(decoder(), sent)


@pytest.mark.parametrize("name", "mib")
def test_no_message_changes_how_the_next_is_read(name: str) -> None:
    # Every way to send a tensor, and every id, after every other.
    bodies = [piece for piece in PIECES if piece[:1] == b"\x2a"]
    bodies += [b + field(7, data) for b in bodies for data in (b"AAAABBBB", b"CCCCDDDD")]
    for before in bodies:
        for after in bodies:
            used = decoder()
            reading(used, field(1, name.encode()) + before)
            second = field(1, name.encode()) + field(3, b"id") + after
            assert reading(used, second) == reading(decoder(), second)
    for body in bodies:
        used = decoder()
        for request_id in [b"", *IDS, b"", *IDS]:
            sent = field(1, name.encode()) + request_id + body
            assert reading(used, sent) == reading(decoder(), sent)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(st.integers(1, 5), st.sampled_from(["", "7", "\u00e9" * 3, "i" * 300]), st.integers(0, 1 << 30))
def test_whatever_happens_to_a_known_message_is_seen(kind: str, rows: int, request_id: str, seed: int) -> None:
    rng = random.Random(seed)
    x = np.frombuffer(rng.randbytes(8 * rows), "<f4").reshape(rows, 2)
    n = np.frombuffer(rng.randbytes(8 * rows), "<f8")
    known = of_kind(kind, np.nan_to_num(x), n, request_id)
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_counts(kind: str) -> None:
    known = of_kind(kind, X, N, "ab")
    for place in range(len(known)):
        for bit in range(8):
            used = decoder()
            reading(used, known)
            data = bytearray(known)
            data[place] ^= 1 << bit
            assert reading(used, bytes(data)) == reading(decoder(), bytes(data))


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_message_is_not_parsed_again(kind: str) -> None:
    models = Models()
    used = decoder(models)
    templates = set()
    for value in range(10):
        for request_id in ("", str(value), "i" * (120 + value), "\u00e9\u4e16" * (value + 1)):
            sent = of_kind(kind, np.full((3, 2), value, np.float32), np.full(3, float(value)), request_id)
            template, buffers, id_field = used.decode(sent)
            templates.add(template)
            assert [bytes(b) for b in buffers] == [bytes(b) for b in decoder().decode(sent)[1]]
            assert protocol.ModelInferResponse.FromString(id_field).id == request_id
    assert len(templates) == 1 and models.asked == 1


@pytest.mark.parametrize("rows", [1, 511, 512, 5000])
@pytest.mark.parametrize("padding", range(4))
def test_small_tensors_are_copied_and_large_ones_looked_at(rows: int, padding: int) -> None:
    # Either way the bytes are those sent, wherever in the message they start.
    used = decoder()
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((rows, 2)).astype(np.float32)
        data = field(100, b"." * padding) + message([("x", x)]).SerializeToString()
        _, (buffer,), _ = used.decode(data)
        assert bytes(buffer) == x.tobytes()
        assert np.array_equal(np.frombuffer(buffer, "<f4").reshape(rows, 2), x)


@pytest.mark.parametrize(
    "sent",
    [
        message([("x", np.full((1, 2), 1 << 52))], typed=True, model_name="l"),  # eight bytes an element, as raw ones
        message([("x", np.ones((0, 2), np.float32))]),
        message([("x", np.array([["text"]], object))], model_name="s"),
    ],
    ids=["varints", "empty", "text"],
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
    models.table["m"] = Target(signature(), version="2")
    used.refresh()
    assert used.decode(data)[0].target is old  # nobody said that something changed
    models.generation += 1
    used.refresh()
    assert used.decode(data)[0].target is models.table["m"]


def shaped(rows: int, **more: Any) -> bytes:
    sent: bytes = message([("x", np.ones((rows, 2), np.float32))], **more).SerializeToString()
    return sent


def test_hundreds_of_models_and_shapes_are_all_known() -> None:
    models = Models()
    names = [f"model{i}" for i in range(400)]
    models.table |= {name: Target(signature(), name) for name in names}
    used = decoder(models)
    sent = [shaped(rows, model_name=name, id=name) for name in names for rows in (1, 2, 3, 8)]
    for _ in range(3):
        for data in sent:
            reading(used, data)
    assert models.asked == len(sent)


def test_a_model_of_very_many_shapes_is_known_in_time() -> None:
    models = Models()
    used = decoder(models)
    for _ in range(8 * RARELY):
        for rows in range(1, 5 * KNOWN_AT_ONCE):
            reading(used, shaped(rows))
    models.asked = 0
    for rows in range(1, 5 * KNOWN_AT_ONCE):
        reading(used, shaped(rows))
    assert models.asked == 0


def test_what_comes_often_stays_however_much_else_comes_once() -> None:
    models = Models()
    used = decoder(models)
    favourites = [shaped(7), shaped(7, id="id"), shaped(5, typed=True, outputs=["y"]), shaped(1, model_name="w")]
    for data in favourites:
        reading(used, data)
    models.asked = 0
    others = 3 * RARELY * KNOWN_TEMPLATES
    for i in range(others):
        reading(used, field(4, field(1, b"%06d" % i)) + good + field(7, b"AAAABBBB"))
        if not i % 100:
            for data in favourites:
                reading(used, data)
    assert models.asked == others


@pytest.mark.parametrize(
    "made",
    [
        lambda i: field(4, field(1, b"k" * (i % 2000 + 1) + b"%d" % i)) + good,
        lambda i: field(1, b"%06d" % i) + good,  # the last name counts, and the first is what is looked up
        lambda i: field(1, b"%06d" % i) + good + field(4, b"\x0a\x01k\x12\x02\x1a\x00") * 700,
        lambda i: field(1, b"m") + field(4, field(1, b"%06d" % i * KNOWN_LONGEST)) + good,
    ],
    ids=["parameters", "names", "names of long ones", "long ones"],
)
def test_memory_is_bounded_whatever_comes(made: Callable[[int], bytes]) -> None:
    used = decoder()
    for i in range(3 * RARELY * KNOWN_TEMPLATES):
        reading(used, made(i) + field(7, b"AAAABBBB"))
    memory = used._memory
    kept = [
        names + key
        for generation in (memory._young, memory._old)
        for names, lengths in generation.items()
        for layouts in lengths.values()
        for _, templates in layouts
        for key in templates
    ]
    assert len(kept) <= 2 * KNOWN_TEMPLATES
    assert sum(map(len, kept)) <= 2 * (KNOWN_BYTES + KNOWN_LONGEST)
    assert max(map(len, kept), default=0) <= KNOWN_LONGEST
    assert len(memory._new) <= KNOWN_TEMPLATES
    assert len(used._replies) <= KNOWN_REPLIES


def test_messages_of_one_length_are_tried_in_few_places() -> None:
    models = Models()
    used = decoder(models)
    total = 8 * 60
    for rows in (*range(1, 50), *range(1, 50)):  # all of one length: the larger the tensor, the shorter the parameter
        rest = shaped(rows)[3:]
        padding = total - len(rest) - 6
        reading(used, field(1, b"m") + field(4, field(1, b"k" * (padding - 2))) + rest)
    (lengths,) = used._memory._young.values()
    assert max(map(len, lengths.values())) == KNOWN_LAYOUTS
