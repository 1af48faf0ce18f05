"""The private calls beneath ONNX Runtime's Python classes. All private names used are in this file.

InferenceSession.run and run_with_iobinding check their arguments at every call, which for a small network takes a fifth
of the run. Our arguments were checked when the request was decoded, so the underlying call is made directly. If a
version lacks these names, the public calls are used: slower, and otherwise the same. test_ort_private checks that the
installed version has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run_of(session: Any) -> Callable[..., Any]:
    """`session.run(names, feeds, options)`, without its checks."""
    return getattr(getattr(session, "_sess", None), "run", session.run)  # type: ignore[no-any-return]


def run_bound_of(session: Any) -> tuple[Callable[..., None], Callable[[Any], Any]]:
    """`session.run_with_iobinding(binding, options)` without its checks; and a function that gives its argument for a
    binding."""
    underneath = getattr(session, "_sess", None)
    if underneath is None or not hasattr(session.io_binding(), "_iobinding"):
        return session.run_with_iobinding, lambda binding: binding
    return underneath.run_with_iobinding, lambda binding: binding._iobinding
