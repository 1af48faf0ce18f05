"""A worker's runs, each under a guard: whatever happens in one, there is an answer or an error for every request.

Any number of threads may run at a time; another may end their runs by `end_since`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from forwardpass.batching.request import LargeTurn
from forwardpass.errors import DeadlineExceeded, DeviceLost, RequestError, RunFailed
from forwardpass.execution.ort_session import new_run_options
from forwardpass.inference.batch_runner import BatchRunner
from forwardpass.inference.request import AnyRequest
from forwardpass.observability.log_limit import LogLimit
from forwardpass.observability.model_metrics import ModelMetrics
from forwardpass.transport.interface import Answer

logger = logging.getLogger(__name__)
logger.addFilter(LogLimit())

Outcome = tuple[list[Answer], float, bool]  # an answer per request, seconds in the network, whether a run failed


class Runs:
    """Runs batches. A failed one is run again in halves until the failing request is alone."""

    def __init__(
        self,
        metrics: ModelMetrics,
        clock: Callable[[], float],
        lost: Callable[[str], None],
        shrink_arena: bool,
    ) -> None:
        """`lost` is called with the reason when a device has failed permanently."""
        self._metrics = metrics
        self._clock = clock
        self._lost = lost
        self._shrink_arena = shrink_arena
        self.running: dict[int, tuple[float, Any]] = {}  # by id: when a run began, its run options

    def answers(self, requests: Sequence[AnyRequest], runner: BatchRunner, matrices: list[int]) -> Outcome:
        """Run a batch, and encode its responses. Appends the rows of its matrices."""
        try:
            return self._answers(requests, runner, matrices)
        except Exception:
            unexpected = self._unexpected()
            return [unexpected] * len(requests), 0.0, True

    def turn(
        self, turn: LargeTurn[AnyRequest], runner: BatchRunner, matrices: list[int]
    ) -> tuple[RequestError | None, float]:
        """Run a turn of a large request, whose `large_run` gets the outputs. Returns its error, seconds in the network.

        Appends the rows of its matrices.
        """
        options = new_run_options(self._shrink_arena)
        began = self._clock()
        self.running[id(options)] = (began, options)
        error: RequestError | None = None
        try:
            runner.run_turn(turn, options, matrices)
        except RequestError as known:
            if isinstance(known, DeviceLost):
                self._lost(str(known))
            error = known
        except Exception:
            error = self._unexpected()
        finally:
            del self.running[id(options)]
        return error, self._clock() - began

    def large_answer(self, request: AnyRequest, runner: BatchRunner) -> Answer:
        """The response to a large request after its last turn, or the error if it cannot be encoded."""
        try:
            (answer,) = runner.scatter([request], request.large_run.outputs.arrays, request.template.outputs)
        except Exception:
            return self._unexpected()
        return answer

    def end_since(self, limit: float) -> int:
        """End every run that began before `limit` seconds on the clock, and return their number."""
        late = [options for began, options in list(self.running.values()) if began < limit]
        for options in late:
            options.terminate = True
        return len(late)

    def _answers(self, requests: Sequence[AnyRequest], runner: BatchRunner, matrices: list[int]) -> Outcome:
        options = new_run_options(self._shrink_arena)
        began = self._clock()
        self.running[id(options)] = (began, options)
        try:
            if len(requests) == 1 and (answer := runner.run_single_row(requests[0], options, matrices)) is not None:
                return [answer], self._clock() - began, False
            outputs, wanted = runner.run(requests, options, matrices)
            run = self._clock() - began
            failures: list[RequestError] = []
            return runner.scatter(requests, outputs, wanted, failures), run, bool(failures)
        except RequestError as error:
            if isinstance(error, DeviceLost):
                self._lost(str(error))
            if len(requests) == 1 or isinstance(error, DeadlineExceeded | DeviceLost):
                return [error] * len(requests), self._clock() - began, True
        finally:
            del self.running[id(options)]
        # Some request in this batch can't be run. Halve the batch until that request is alone.
        self._metrics.isolate()
        middle = len(requests) // 2
        first, run_first, _ = self._answers(requests[:middle], runner, matrices)
        second, run_second, _ = self._answers(requests[middle:], runner, matrices)
        return first + second, run_first + run_second, True

    def _unexpected(self) -> RunFailed:
        """The error for the exception that is being handled, which is logged."""
        logger.exception("model %s version %s: a batch failed unexpectedly", *self._metrics.labels)
        return RunFailed("internal error; the server's log has the details")
