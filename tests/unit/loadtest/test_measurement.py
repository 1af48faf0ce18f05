"""What is made of the counts: the figures, and whether the client is to be believed."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from tests.unit.loadtest.made import measured

from forwardpass.loadtest import measurement as measured_module
from forwardpass.loadtest import request_bodies, server_metrics
from forwardpass.loadtest.generator.recording import Recording


def test_a_client_that_sends_late_says_so() -> None:
    assert measured(latency=0.002, lag=1e-6).saturation == []
    (why,) = measured(latency=0.002, lag=0.005, busy=0.9).saturation
    assert "too much to do" in why
    (why,) = measured(latency=0.002, lag=0.005, busy=0.3).saturation
    assert "other work" in why


def test_a_small_lag_is_the_timer_and_a_small_share_is_no_matter() -> None:
    assert measured(latency=0.0001, lag=90e-6).saturation == []
    assert measured(latency=0.5, lag=0.01).saturation == []


def test_a_client_without_a_pause_is_saturated() -> None:
    (why,) = measured(busy=0.99).saturation
    assert "99%" in why


def test_what_came_late_tells_what_an_overloaded_server_answers() -> None:
    # 1000/s are due for 2 s, and each waits as long again as has passed: 500/s are answered.
    slices = np.repeat(np.arange(20), 100)
    recording = Recording(20)
    recording.add_latencies(slices, (slices + 0.5) * 0.1)
    offer = dataclasses.replace(measured().offer, seconds=2.0)
    overloaded = dataclasses.replace(measured(), offer=offer, recording=recording)
    assert overloaded.answered_late == pytest.approx(500, rel=0.1)
    assert measured(rate=1000.0, latency=0.001).answered_late == pytest.approx(1000, rel=0.1)


def test_figures_as_json_can_have_them() -> None:
    nothing = measured(rate=0.0, failed=5)
    said = json.loads(json.dumps(nothing.as_json(), allow_nan=False))
    assert said["latency_seconds"]["p99"] is None
    assert said["outcomes"] == {"RESOURCE_EXHAUSTED": 5}
    assert nothing.quantile(0.5, of_all=True) == math.inf


def test_a_table_has_a_line_for_each() -> None:
    text = measured_module.table([measured(), measured(in_flight=8), measured(lag=0.05)])
    lines = text.splitlines()
    assert len(lines) == 4 and "8 in flight" in lines[2] and lines[3].endswith("client saturated")


@pytest.mark.parametrize("text", ["", "0", "a", "1:x", "1:-1", "2:0"])
def test_a_mix_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        request_bodies.parse_mix(text)


def test_mixes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert request_bodies.parse_mix("8") == {8: 1.0}
    assert request_bodies.parse_mix("1:70,8:30") == {1: 70.0, 8: 30.0}
    path = tmp_path / "mix.csv"
    path.write_text("rows,count\n1,10\n4,5\n1,10\n")
    assert request_bodies.read_mix(path) == {1: 20.0, 4: 5.0}
    path.write_text("1\n1\n16\n")
    assert request_bodies.read_mix(path) == {1: 2.0, 16: 1.0}


def test_a_window_is_the_difference_of_two_scrapes() -> None:
    def scrape(requests: int, rows: float, slow: int) -> server_metrics.Samples:
        labels = frozenset({("model", "m"), ("version", "1")})
        found = {("forwardpass_requests_total", labels | {("code", "OK")}): float(requests)}
        found["forwardpass_batch_rows_count", labels] = requests / 2
        found["forwardpass_batch_rows_sum", labels] = rows
        for bound, count in (("1.0", requests / 2 - slow), ("+Inf", requests / 2)):
            found["forwardpass_batch_rows_bucket", labels | {("le", bound)}] = count
        return found

    window = server_metrics.window(scrape(100, 100.0, 0), scrape(300, 500.0, 40), "m")
    assert window is not None
    assert window["requests"] == 200
    assert window["batch_rows"] == {"mean": 4.0, "buckets": [[1.0, 60.0], [None, 40.0]]}
    assert server_metrics.window(scrape(1, 1, 0), scrape(1, 1, 0), "another") is None
    assert server_metrics.window(None, {}, "m") is None
