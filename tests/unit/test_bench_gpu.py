"""What of bench_gpu.py needs no device: files, floors, timing, processes, verdicts, tables; and its document."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts find each other there, as when they are run

import bench_gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_memory  # noqa: E402
import gpu_processes  # noqa: E402
import gpu_report  # noqa: E402
import gpu_serving  # noqa: E402
import mlp_file  # noqa: E402
import timing  # noqa: E402
from gpu_cases import Case, Roofs  # noqa: E402
from harness import BenchmarkError  # noqa: E402

# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_a_file_that_was_written_by_hand_is_onnx(tmp_path: Path, half: bool) -> None:
    layers = mlp_file.layers((64, 300, 7))
    mlp_file.write(tmp_path / "m" / "model.onnx", layers, half)
    model = onnx.load(tmp_path / "m" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    for i, (w, b) in enumerate(layers):
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        assert stored[f"w{i}"].tobytes() == w.astype(stored[f"w{i}"].dtype).tobytes()
        assert stored[f"b{i}"].shape == b.shape
    session = onnxruntime.InferenceSession(tmp_path / "m" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [("x", "tensor(float)", ["batch", 64])]
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    (w1, b1), (w2, b2) = layers
    by_hand = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
    tolerance = 1e-2 if half else 1e-5
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], by_hand, rtol=tolerance, atol=tolerance)


def test_random_networks_neither_die_out_nor_blow_up() -> None:
    for widths in gpu_cases.NETWORKS.values():
        if max(widths) > 1000:
            continue  # a hundred megabytes
        a = np.random.default_rng(1).standard_normal((64, widths[0]))
        for w, b in mlp_file.layers(widths):
            a = np.maximum(a @ w.T + b, 0)
        assert 0.1 < a.std() < 10


# -- floors -----------------------------------------------------------------------------------------------------------


def test_floors_are_those_of_the_widths() -> None:
    widths = (3, 5, 2)
    assert gpu_cases.flops(widths, 7) == 2 * 7 * (15 + 10)
    assert gpu_cases.least_bytes(widths, 7, 4) == 4 * (15 + 5 + 10 + 2) + 4 * 7 * (3 + 2)
    assert gpu_cases.least_bytes(widths, 7, 2) == 2 * (15 + 5 + 10 + 2) + 4 * 7 * (3 + 2)  # x and y stay float32
    found = gpu_cases.floors("1024-4096-4096-1000", 4096, "fp32", Roofs(2e12, 50e12))
    assert found.products == pytest.approx(2 * 4096 * (1024 * 4096 + 4096 * 4096 + 4096 * 1000) / 50e12)
    assert found.larger == found.products > found.memory
    alone = gpu_cases.floors("1024-4096-4096-1000", 1, "fp32", Roofs(2e12, 50e12))
    assert alone.larger == alone.memory  # one row reads all the weights


def test_keys_are_cases_and_back() -> None:
    made = gpu_cases.cases(["64-256-256-10"], [1, 64], ["fp32", "fp16"], ["ort", "torch.device"])
    assert [Case.of(case.key) for case in made] == made
    assert len({case.key for case in made}) == len(made) == 3 + 2 * 2 * 2
    assert made[0].way == gpu_cases.COPY


# -- timing -----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that goes on by what the work takes; the first runs take longer."""

    def __init__(self, first: float, later: float) -> None:
        self.now, self.runs, self._times = 0.0, 0, (first, later)

    def work(self) -> None:
        self.now += self._times[self.runs >= 3]
        self.runs += 1

    def __call__(self) -> float:
        return self.now


def test_windows_are_filled_and_the_warm_up_is_not_counted() -> None:
    clock = Clock(0.05, 1e-4)
    found = timing.per_run(clock.work, timing.Windows(0.2, 4), clock)
    assert found == pytest.approx([1e-4] * 4)
    slow = Clock(3.0, 3.0)
    assert timing.per_run(slow.work, timing.Windows(0.2, 2), slow) == pytest.approx([3.0, 3.0])
    assert slow.runs == 3  # one to warm up, one a window


# -- processes --------------------------------------------------------------------------------------------------------


def worker(folder: Path, body: str) -> list[str]:
    """A worker that says what it runs on and then, for each key, does as `body` says."""
    path = folder / "worker.py"
    head = """
    import json, os, sys, time
    print("a library says hello")
    print(json.dumps({"device": {"name": "D"}}), flush=True)
    for key in map(str.strip, sys.stdin):
    """
    path.write_text(textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body), "    "))
    return [sys.executable, str(path)]


def collected(keys: list[str], command: list[str], patience: float = 20.0) -> tuple[Any, dict[str, Any], list[str]]:
    told: list[str] = []
    device, found = gpu_processes.collect(keys, command, patience, lambda key, _: told.append(key))
    return device, found, told


def test_a_case_that_ends_its_process_costs_its_own_figure_alone(tmp_path: Path) -> None:
    command = worker(
        tmp_path,
        """
        if key == "b":
            print("an illegal memory access was encountered", file=sys.stderr)
            os._exit(9)
        print(json.dumps({"case": key, "seconds": [1.0]}), flush=True)
        """,
    )
    device, found, told = collected(["a", "b", "c", "d"], command)
    assert device == {"name": "D"}
    assert [found[key].get("seconds") for key in "abcd"] == [[1.0], None, [1.0], [1.0]]
    assert found["b"]["failed"] == "its process ended with 9 (an illegal memory access was encountered)"
    assert told == ["a", "b", "c", "d"]


def test_a_case_that_hangs_is_given_up(tmp_path: Path) -> None:
    command = worker(
        tmp_path,
        """
        if key == "a":
            time.sleep(60)
        print(json.dumps({"case": key, "seconds": [1.0]}), flush=True)
        """,
    )
    # Two processes must have begun within that time, one after the other.
    _, found, _ = collected(["a", "b"], command, patience=3.0)
    assert found["a"]["failed"] == "took more than 3 s"
    assert found["b"] == {"seconds": [1.0]}


def test_a_worker_that_cannot_begin_ends_it_all(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("import nowhere_to_be_found")
    device, found, told = collected(["a", "b"], [sys.executable, str(tmp_path / "worker.py")])
    assert device == {}
    assert all("No module named 'nowhere_to_be_found'" in found[key]["failed"] for key in "ab")
    assert told == ["a", "b"]


def test_where_there_is_no_device_the_worker_says_so_in_every_row(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here, which make bench-gpu measures")
    output = tmp_path / "result.json"
    given = ["--quick", "--parts", "cases", "--networks", "64-256-256-10", "--batches", "1", "--output", str(output)]
    assert bench_gpu.main(given) == 2
    result = json.loads(output.read_text())
    assert result["device"] == {}
    assert len(result["cases"]) == 2 + len(gpu_cases.WAYS)
    assert all("its process ended with 1" in figures["failed"] for figures in result["cases"].values())
    assert "no device could be used" in gpu_report.text(result)


# -- mixed batches ----------------------------------------------------------------------------------------------------


def mixed(run: Any, used: Any, batches: int = 500) -> gpu_memory.Flat:
    rows = np.random.default_rng(3).standard_normal((256, 4)).astype(np.float32)
    return gpu_memory.mixed(run, rows, 2.0 * rows, 64, batches, used, 1e-4, 1e-5)


def test_mixed_batches_are_of_every_size_and_awkward_at_first() -> None:
    sizes: list[int] = []

    def run(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        sizes.append(len(rows))
        return 2 * rows

    found = mixed(run, lambda: 5, 2000)
    assert tuple(sizes[: len(gpu_memory.AWKWARD)]) == gpu_memory.AWKWARD
    assert set(sizes) == set(range(1, 65))
    assert (found.wrong, found.growth, len(found.used)) == (0, 0, gpu_memory.SAMPLES)


def test_an_answer_of_other_rows_is_seen_and_so_is_memory_that_grows() -> None:
    calls = 0

    def run(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nonlocal calls
        calls += 1
        return 2 * (rows if calls % 100 else np.roll(rows, 1) + 1)

    used = iter(range(0, 10**9, 1000))
    found = mixed(run, lambda: next(used))
    assert found.wrong == 5
    assert found.growth == 1000 * (len(found.used) - 1 - 10)
    nan = mixed(lambda rows: rows * np.nan, lambda: 0, 3)
    assert nan.wrong == 3


def test_what_memory_does_before_the_warm_up_is_over_does_not_count() -> None:
    assert gpu_memory.growth([1, 2, 3, 50, 50, 50, 50, 50, 50, 50]) == 48
    assert gpu_memory.growth([1] + [50] * 19) == 49 - 49
    assert gpu_memory.growth([]) == 0


# -- serving ----------------------------------------------------------------------------------------------------------


def test_server_and_load_have_half_of_the_cores_each() -> None:
    assert gpu_serving.halves({4, 0, 2, 6, 8}) == (frozenset({0, 2}), [4, 6, 8])
    with pytest.raises(BenchmarkError, match="a core each"):
        gpu_serving.halves({3})


def test_every_scenario_has_its_like_on_the_other_provider() -> None:
    assert len({scenario.key for scenario in gpu_serving.SCENARIOS}) == len(gpu_serving.SCENARIOS)
    cpu, cuda = (
        [(s.network, s.in_flight, s.rows) for s in gpu_serving.SCENARIOS if s.provider == provider]
        for provider in ("cpu", "cuda")
    )
    assert cpu == cuda


def test_a_scenario_that_fails_is_a_figure_like_any_other() -> None:
    def fails() -> dict[str, Any]:
        raise BenchmarkError("no device\n  anywhere")

    assert bench_gpu.attempt(fails) == {"failed": "BenchmarkError: no device anywhere"}


# -- the report -------------------------------------------------------------------------------------------------------

SMALL, LARGE = "64-256-256-10", "1024-4096-4096-1000"


def result(**changed: float) -> dict[str, Any]:
    """A result with round figures that meets everything; `changed` in µs, by way."""
    us = {
        "ort": 100.0, "ort-bound": 60.0, "forwardpass": 25.0, "torch": 80.0, "torch-graph": 25.0,
        "ort-bound.device": 40.0, "ort-graph.device": 13.0, "torch.device": 50.0, "torch-graph.device": 12.0,
        "matmul.device": 10.0, **changed,
    }  # fmt: skip
    cases = {
        case.key: {"seconds": [us[case.way] * 1e-6 * factor for factor in (1.0, 0.9, 1.5)], "difference": 1e-6}
        for case in gpu_cases.cases([SMALL, LARGE], [1, 64, 4096], ["fp32"], list(gpu_cases.WAYS))
        if case.network != gpu_cases.ROOF
    }
    cases["roof/0/fp32/copy"] = {"seconds": [1e-3], "per_second": 2e12}
    cases["roof/0/fp32/matmul"] = {"seconds": [1e-3], "per_second": 5e13}
    return {
        "date": "2027-01-31",
        "windows": 3,
        "window_seconds": 0.1,
        "device": {
            "name": "Some GPU", "memory": 80 << 30, "multiprocessors": 132, "driver": "580.1", "python": "3.12.3",
            "packages": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
        },
        "cases": cases,
        "memory": {"batches": 100_000, "wrong": 0, "used": [5 << 20] * 100},
        "serving": {
            f"{SMALL}/cuda/64/1": {
                "requests_per_second": 12345.6, "p50_us": 1000.0, "p99_us": 2500.0, "failed": None, "batch_rows": 20.0,
                "provider": "cuda:0",
            }
        },
    }  # fmt: skip


def test_a_result_that_meets_everything_says_so() -> None:
    rows = [ratio.row for ratio in gpu_report.verdicts(result())]
    assert [row[1] for row in rows] == ["4.00", "1.00", "4.00", "1.00", "1.30", "0.0", "0"]
    assert {row[-1] for row in rows} == {"met"}
    assert bench_gpu.status(result()) == 0


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"forwardpass": 51.0, "torch-graph": 60.0}, "plain run to graph, 64-256-256-10, 1 rows"),
        ({"torch-graph": 24.0}, "graph to PyTorch's with CUDA graphs, 64-256-256-10, 1 rows"),
        ({"ort-graph.device": 13.2}, "graph to the same products by torch.matmul, 1024-4096-4096-1000, 4096 rows"),
    ],
)
def test_what_is_missed_is_said(changed: dict[str, float], missed: str) -> None:
    found = result(**changed)
    assert missed in [ratio.what for ratio in gpu_report.verdicts(found) if ratio.verdict == "NOT met"]
    assert bench_gpu.status(found) == 1


def test_memory_that_grows_and_wrong_answers_are_said() -> None:
    found = result()
    found["memory"] = {"batches": 100_000, "wrong": 3, "used": [0] * 50 + [3 << 20] * 50}
    verdicts = {ratio.what: ratio.verdict for ratio in gpu_report.verdicts(found)}
    assert verdicts["MiB of device memory more after 100,000 mixed batches"] == "NOT met"
    assert verdicts["wrong answers among them"] == "NOT met"


def test_a_failure_is_a_cell_and_a_line_and_takes_nothing_with_it() -> None:
    found = result()
    found["cases"][f"{SMALL}/64/fp32/torch-graph"] = {"failed": "RuntimeError: capture failed"}
    del found["cases"]["roof/0/fp32/matmul"]
    text = gpu_report.markdown(found)
    assert "| 64-256-256-10 | 64 | 100 | 60.0 | 25.0 | 80.0 | failed | 4.00 | - |" in text
    assert f"- {SMALL}/64/fp32/torch-graph: RuntimeError: capture failed" in text
    assert "| 64-256-256-10 | 1 | 40.0 | 13.0 | 50.0 | 12.0 | 10.0 | - | - | - | - |" in text  # no roof, no floor
    assert len(gpu_report.verdicts(found)) == 6


def test_tables_have_medians_floors_and_what_was_served() -> None:
    text = gpu_report.markdown(result())
    assert "Some GPU, 80 GiB, driver 580.1" in text
    assert "2,000 GB/s" in text and "50.0 TFLOP/s" in text
    floor = gpu_cases.floors(LARGE, 4096, "fp32", Roofs(2e12, 5e13)).larger
    assert f"{floor * 1e6:,.0f} | {13e-6 / floor:.2f} |" in text
    assert "| 64-256-256-10 | 64 | 1 | cuda:0 | 12,346 | 1.000 | 2.500 | 20.0 |" in text
    assert gpu_report.text(result())


def test_an_answer_that_is_off_fails_the_benchmark() -> None:
    found = result()
    found["cases"][f"{SMALL}/1/fp32/torch"] = {"failed": "ValueError: its answers are off by 0.5 of the largest"}
    assert bench_gpu.status(found) == 1


def test_the_document_tells_what_is_recorded() -> None:
    document = gpu_report.DOCS.read_text("utf-8")
    expected = gpu_report.rendered(document, gpu_report.markdown(gpu_report.newest()))
    assert document == expected, "run benchmarks/gpu_report.py"


def test_without_a_recorded_run_the_document_has_no_figure(tmp_path: Path) -> None:
    assert gpu_report.newest(tmp_path) is None
    assert gpu_report.markdown(None) == gpu_report.NONE
    with pytest.raises(ValueError, match="gpu: end"):
        gpu_report.rendered("# Title", "")
