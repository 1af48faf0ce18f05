"""The waiting requests by stack key, each group in its order; settled ones stay in place until they are in the way."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from forwardpass.batching.request import QUEUED, SETTLED, RequestT


class StackGroups(dict[Hashable, list[RequestT]]):
    """By stack key, the requests that may share a batch. `dead` counts those that are settled and still in a group."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = 0

    def clear(self) -> None:
        super().clear()
        self.dead = 0

    def waiting(self) -> Iterator[RequestT]:
        """All that wait, group by group."""
        for group in self.values():
            for request in group:
                if request.state == QUEUED:
                    yield request

    def first(self) -> list[RequestT] | None:
        """The group whose first live request comes first overall."""
        if len(self) == 1 and not self.dead:
            (group,) = self.values()
            return group or None
        best: list[RequestT] | None = None
        for stack_key in list(self):
            group = self[stack_key]
            dead = 0
            while dead < len(group) and group[dead].state == SETTLED:
                dead += 1
            if dead:
                del group[:dead]
                self.dead -= dead
            if not group:
                del self[stack_key]
            elif best is None or group[0].order < best[0].order:
                best = group
        return best

    def left(self, others: int) -> None:
        """One more is settled in place. When they are many, and more than the `others`, they are removed."""
        self.dead += 1
        if self.dead > 64 and self.dead > others:
            for stack_key in list(self):
                kept = [r for r in self[stack_key] if r.state == QUEUED]
                if kept:
                    self[stack_key] = kept
                else:
                    del self[stack_key]
            self.dead = 0
