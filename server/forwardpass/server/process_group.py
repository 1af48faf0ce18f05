"""What a server is given where it is one of several processes that serve as one: see the package `processes`.

Connections come from the supervisor's ports, and what must hold for all processes is asked of the supervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forwardpass.observability.catalogue import SampleSink
from forwardpass.repository.repository import Repository
from forwardpass.status.snapshot import ProcessSample
from forwardpass.transport.handed_listener import HandedListener

Methods = Mapping[str, Callable[[Any], Any]]  # unary methods by name, from message to message; some are coroutines


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A server as its group sees it."""

    repository: Repository
    collect: Callable[[SampleSink], object]  # adds the samples of a scrape; blocks
    status: Callable[[], ProcessSample]  # what the status page shows of this process; blocks
    part_with: Callable[[int], None]  # asks so many clients of the gRPC port to connect anew
    wake: Callable[[], None]  # called on the event loop after `ProcessGroup.ready` has changed


class ProcessGroup(Protocol):
    """The group, as one of its processes sees it. Used on the event loop."""

    @property
    def grpc(self) -> HandedListener: ...
    @property
    def http(self) -> HandedListener: ...
    @property
    def ready(self) -> bool:
        """Whether the server as a whole is ready."""

    def shared(self, own: Methods) -> Methods:
        """Those of this process's `own` methods that are answered for the whole group, each with what answers it."""

    def join(self, member: GroupMember) -> None:
        """The ports are open, and models are about to be loaded."""

    def changed(self, accepts: bool, complete: bool) -> None:
        """Models changed, or whether this process accepts calls, or whether it has every model that it should have."""

    def others(self) -> Sequence[ProcessSample]:
        """What the status page shows of the other processes. Blocks; not on the event loop."""

    async def leave(self) -> None:
        """This process has answered its last call."""
