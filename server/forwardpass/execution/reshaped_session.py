"""A network whose clients send and receive other shapes than it has: the `reshape` option of its tensors.

Elements and their order stay; reshaping an array costs no copy. Clients' shapes are in the signature of the session
made here, so that everything outside deals with one shape alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from forwardpass.errors import RunFailed
from forwardpass.execution.placement import Placement
from forwardpass.execution.session import Arrays, Session, Task
from forwardpass.model.signature import ModelSignature, TensorSpec
from forwardpass.observability.gpu import GpuBatchRecord


class ReshapedSession:
    """`session`, run with arrays of the shapes in `signature`, whose tensors name the network's own shapes."""

    def __init__(self, session: Session, signature: ModelSignature) -> None:
        self._session = session
        self.signature = signature
        self._room: Arrays | None = None  # what was given for the next run, and its views in clients' shapes
        self._given: Arrays | None = None

    def run(self, arrays: Arrays, outputs: tuple[int, ...], options: Any = None) -> list[NDArray[Any]]:
        """As Session.run. Raises RunFailed too, where an output has more or fewer elements than its shape has."""
        # A session knows its own room again by the list that it gave.
        room, given, self._room, self._given = self._room, self._given, None, None
        mine = room if room is not None and arrays is given else in_network_shape(self.signature.inputs, arrays)
        found = self._session.run(mine, outputs, options)
        return [self._answer(self.signature.outputs[i], array) for i, array in zip(outputs, found, strict=True)]

    @staticmethod
    def _answer(tensor: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
        try:
            return _to_client(tensor, array)
        except ValueError:
            raise RunFailed(
                f"output '{tensor.name}' came in shape {list(array.shape)}, which cannot be {list(tensor.shape)}"
            ) from None

    @property
    def placement(self) -> Placement:
        return self._session.placement

    @property
    def how(self) -> str:
        return self._session.how

    @property
    def own_thread(self) -> bool:
        return self._session.own_thread

    def prepare(self, rows: int, pads: bool, samples: Arrays, half: bool = False) -> None:
        self._session.prepare(rows, pads, in_network_shape(self.signature.inputs, samples), half)

    def room(self, rows: int) -> Sequence[NDArray[Any]] | None:
        self._room = self._session.room(rows)
        self._given = None if self._room is None else in_client_shape(self.signature.inputs, self._room)
        return self._given

    def bound(self, given: NDArray[Any], place: int, found: NDArray[Any]) -> Callable[[Any], None] | None:
        given, found = _to_network(self.signature.inputs[0], given), _to_network(self.signature.outputs[place], found)
        return self._session.bound(given, place, found)

    def long_task(self, job: Callable[[], object]) -> Task | None:
        return self._session.long_task(job)

    def report_to(self, ran: Callable[[GpuBatchRecord], None]) -> None:
        self._session.report_to(ran)

    def close(self, seconds: float = 10.0) -> bool:
        return self._session.close(seconds)


def in_network_shape(tensors: Sequence[TensorSpec], arrays: Arrays) -> list[NDArray[Any]]:
    """Clients' arrays of `tensors`, one each, in the shapes that the network has. Raises ValueError."""
    return [_to_network(tensor, array) for tensor, array in zip(tensors, arrays, strict=True)]


def in_client_shape(tensors: Sequence[TensorSpec], arrays: Arrays) -> list[NDArray[Any]]:
    """The inverse of `in_network_shape`. Raises ValueError."""
    return [_to_client(tensor, array) for tensor, array in zip(tensors, arrays, strict=True)]


def _to_network(tensor: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    return array if tensor.network_shape is None else _reshaped(array, tensor.shape, tensor.network_shape)


def _to_client(tensor: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    return array if tensor.network_shape is None else _reshaped(array, tensor.network_shape, tensor.shape)


def _reshaped(array: NDArray[Any], now: tuple[int, ...], then: tuple[int, ...]) -> NDArray[Any]:
    """`array`, of shape `now`, in shape `then`. Where axis 0 is of any size in both, it is the batch and stays.

    Besides it, at most one size may be unknown (-1).
    """
    if now[:1] == then[:1] == (-1,):
        then = (len(array), *then[1:])
    return array.reshape(then)
