"""The calls underneath ONNX Runtime's Python classes, all that is used of them: private names, in this one file.

InferenceSession.run and run_with_iobinding check their arguments anew at every call, which for a small network takes a
fifth of the run. Ours were checked when the request was decoded, so the call that those make underneath is made
directly. Where a version has none of these names the public calls are used: slower, and otherwise the same.
test_ort_private holds that the version that is installed has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run_of(session: Any) -> Callable[..., Any]:
    """`session.run(names, feeds, options)`, without its checks."""
    return getattr(getattr(session, "_sess", None), "run", session.run)  # type: ignore[no-any-return]


def run_bound_of(session: Any) -> tuple[Callable[..., None], Callable[[Any], Any]]:
    """`session.run_with_iobinding(binding, options)` without its checks; and what turns a binding into its argument."""
    underneath = getattr(session, "_sess", None)
    if underneath is None or not hasattr(session.io_binding(), "_iobinding"):
        return session.run_with_iobinding, lambda binding: binding
    return underneath.run_with_iobinding, lambda binding: binding._iobinding
