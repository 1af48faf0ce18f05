"""A CUDA device that is ordinary memory, and ONNX Runtime's CUDA provider on it: networks are really run, on the CPU.

What CUDA and ONNX Runtime promise is kept where a mistake would show: copies happen when the stream comes to them and
not before it is waited for; a graph works on the addresses and the shape it was captured with, and only the thread that
captured it has it; a device must be chosen by each thread; memory that was freed is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from forwardpass.execution.cuda.driver import OUT_OF_MEMORY, CudaError

WARM_UPS = 2  # ordinary runs that ONNX Runtime makes of a shape before it captures it
REFUSAL = (
    "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as requested by the user  as "
    "all compute graph nodes have not been partitioned to the CUDAExecutionProvider"
)
ILLEGAL_ADDRESS = "an illegal memory access was encountered (cudaErrorIllegalAddress)"


def cuda_failure(code: int, text: str) -> RuntimeError:
    """As ONNX Runtime raises it from a run."""
    return RuntimeError(
        f"Error in execution: CUDA failure {code}: {text} ; GPU=0 ; hostname=h ; file=/src/c.cc ; line=5 ; expr=x(); "
    )


def short_of_memory() -> CudaError:
    return CudaError(OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory")


class FakeDriver:
    """A Driver of `devices` devices. Thread-safe as far as its tests need it.

    `fails`: by the name of a call, what it raises, once. `sticky`: what everything says from now on.
    """

    def __init__(self, devices: int = 1, capacity: int = 1 << 30) -> None:
        self.count = devices
        self.capacity = capacity  # bytes of each device
        self.fails: dict[str, Exception] = {}
        self.sticky = ""
        self.calls: Counter[str] = Counter()
        self.blocks: dict[int, tuple[str, NDArray[np.uint8], int]] = {}  # address -> host or device, memory, device
        self.streams: dict[int, list[Callable[[], object]]] = {}  # what is enqueued
        self.capturing: set[int] = set()
        self.timing_events: dict[int, float] = {}
        self._clock = 0.0
        self._next = 1000
        self._chosen = threading.local()
        self._lock = threading.Lock()

    def _called(self, name: str) -> int:
        """The device of this thread."""
        self.calls[name] += 1
        if name in self.fails:
            raise self.fails.pop(name)
        if self.sticky:
            raise CudaError(700, "cudaErrorIllegalAddress", self.sticky)
        device: int | None = getattr(self._chosen, "device", None)
        assert device is not None, f"{name}: this thread has chosen no device"
        return device

    def _number(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def devices(self) -> int:
        return self.count

    def bus_id(self, device: int) -> str:
        return f"00000000:{device:02x}:00.0"

    def use(self, device: int) -> None:
        self._chosen.device = device
        self._called("use")

    def stream(self) -> int:
        self._called("stream")
        number = self._number()
        self.streams[number] = []
        return number

    def end_stream(self, stream: int) -> None:
        self._called("end_stream")
        assert not self.streams.pop(stream), "something was enqueued and never waited for"

    def _memory(self, kind: str, nbytes: int, device: int) -> int:
        memory = np.full(nbytes, 0 if kind == "device" else 0xA5, np.uint8)
        address = int(memory.ctypes.data)
        self.blocks[address] = (kind, memory, device)
        return address

    def host_memory(self, nbytes: int) -> int:
        return self._memory("host", nbytes, self._called("host_memory"))

    def free_host(self, address: int) -> None:
        self._called("free_host")
        assert self.blocks.pop(address)[0] == "host"

    def taken(self, device: int = 0) -> int:
        """Bytes of a device."""
        return sum(len(m) for kind, m, on in self.blocks.values() if kind == "device" and on == device)

    def device_memory(self, nbytes: int) -> int:
        device = self._called("device_memory")
        if self.taken(device) + nbytes > self.capacity:
            raise short_of_memory()
        return self._memory("device", nbytes, device)

    def free_device(self, address: int) -> None:
        self._called("free_device")
        assert self.blocks.pop(address)[0] == "device"

    def _inside(self, kind: str, address: int, nbytes: int, device: int) -> None:
        for start, (of, memory, on) in self.blocks.items():
            if of == kind and on == device and start <= address and address + nbytes <= start + len(memory):
                return
        raise AssertionError(f"{nbytes} bytes at {address} are not in memory of the {kind}")

    def _copy(self, to: tuple[str, int], of: tuple[str, int], nbytes: int, stream: int, name: str) -> None:
        device = self._called(name)
        self._inside(*to, nbytes, device)
        self._inside(*of, nbytes, device)
        self.streams[stream].append(lambda: ctypes.memmove(to[1], of[1], nbytes))

    def copy_in(self, device: int, host: int, nbytes: int, stream: int) -> None:
        self._copy(("device", device), ("host", host), nbytes, stream, "copy_in")

    def copy_out(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self._copy(("host", host), ("device", device), nbytes, stream, "copy_out")

    def go_on(self, stream: int) -> None:
        """The device does what was enqueued."""
        enqueued = self.streams[stream]
        while enqueued:
            enqueued.pop(0)()

    def wait(self, stream: int) -> None:
        self._called("wait")
        self.go_on(stream)

    def end_capture(self, stream: int) -> None:
        self._called("end_capture")
        self.capturing.discard(stream)

    def event(self) -> int:
        self._called("event")
        return self._number()

    def end_event(self, event: int) -> None:
        self._called("end_event")

    def mark(self, event: int, stream: int) -> None:
        self._called("mark")

        def marked() -> None:
            self._clock += 1e-6
            self.timing_events[event] = self._clock

        self.streams[stream].append(marked)

    def between(self, first: int, second: int) -> float:
        self._called("between")
        return self.timing_events[second] - self.timing_events[first]

    def broken(self, stream: int) -> str:
        self.calls["broken"] += 1
        if stream in self.capturing:
            return "operation not permitted when stream is capturing"
        self.streams[stream].clear()
        return self.sticky


class FakeBinding:
    """An IOBinding on the device: one of the CPU's with the same addresses."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session
        self.binding = session.real.io_binding()
        self._iobinding = self  # what InferenceSession hands to the session beneath it
        self.addresses: list[tuple[int, int]] = []  # with bytes

    def _bind(self, bind: Any, name: str, kind: str, device: int, element: Any, shape: Any, address: int) -> None:
        assert kind == "cuda" and device == self._session.device
        size = 2 if isinstance(element, int) else np.dtype(element).itemsize
        nbytes = int(np.prod(shape)) * size
        self._session.driver._inside("device", address, nbytes, device)
        self.addresses.append((address, nbytes))
        bind(name, "cpu", 0, element, list(shape), address)

    def bind_input(self, *what: Any) -> None:
        if self._session.fake.copies_inputs:  # there and then, for a node on the processor
            name, _, _, element, shape, address = what
            nbytes = int(np.prod(shape)) * np.dtype(element).itemsize
            taken = np.frombuffer(ctypes.string_at(address, nbytes), element).reshape(shape)
            self.binding.bind_cpu_input(name, taken)
        else:
            self._bind(self.binding.bind_input, *what)

    def bind_output(self, *what: Any) -> None:
        self._bind(self.binding.bind_output, *what)


class FakeSession:
    """As ONNX Runtime's InferenceSession on the CUDA provider."""

    def __init__(self, fake: FakeRuntime, path: Path, options: Any, device_options: dict[str, str]) -> None:
        self.real = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.fake = fake
        self.driver = fake.driver
        self.device = int(device_options["device_id"])
        self.graphs = device_options["enable_cuda_graph"] == "1"
        self.stream = int(device_options["user_compute_stream"])
        self.captured: dict[tuple[int, str], FakeBinding] = {}  # (thread, graph)
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self.get_overridable_initializers = self.real.get_overridable_initializers
        self._sess = weakref.proxy(self)  # the session beneath

    def get_providers(self) -> list[str]:
        return [self.fake.provider, "CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self)

    def run(self, names: list[str], feeds: dict[str, Any], options: Any = None) -> list[Any]:
        """A plain run. With graphs on, ONNX Runtime would capture what it does not say is not to be."""
        assert not self.graphs or options.get_run_config_entry("gpu_graph_id") == "-1"
        with contextlib.suppress(RuntimeError):  # where it is not set
            options.get_run_config_entry("disable_synchronize_execution_providers")
            raise AssertionError("the answers of a plain run are read at once: it must be waited for")
        self.driver._called("plain run")
        self.fake.ways["plain"] += 1
        self.fake.before()
        found: list[Any] = self.real.run(names, feeds, options)
        return found

    def run_with_ort_values(self, names: list[str], feeds: dict[str, Any], options: Any = None) -> list[Any]:
        """As `run`, for bfloat16."""
        assert not self.graphs or options.get_run_config_entry("gpu_graph_id") == "-1"
        self.driver._called("plain run")
        self.fake.ways["plain"] += 1
        found: list[Any] = self.real.run_with_ort_values(names, feeds, options)
        return found

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.driver._called("bound run")
        graph = options.get_run_config_entry("gpu_graph_id")
        if graph == "-1" or not self.graphs:
            assert graph == "-1", "a graph was named where there are none"
            self.fake.ways["bound"] += 1
            self._run(binding, options)
            return
        key = (threading.get_ident(), graph)
        if key in self.captured:
            self.fake.ways["graph"] += 1
            if not self.fake.bakes:
                self._run(self.captured[key])
                self._round(self.captured[key])
            return
        self.fake.captures.append(key)
        if self.fake.capture_fails:
            self.driver.capturing.add(self.stream)
            raise cuda_failure(900, "operation not permitted when stream is capturing")
        for _ in range(WARM_UPS + 1):
            self._run(binding)
        self.captured[key] = binding

    def _round(self, binding: FakeBinding) -> None:
        """The answers as `rounds` says."""
        if self.fake.rounds:
            address, nbytes = binding.addresses[-1]
            answers = np.frombuffer((ctypes.c_char * nbytes).from_address(address), np.float32)
            answers *= np.float32(1 + self.fake.rounds)

    def _run(self, binding: FakeBinding, options: Any = None) -> None:
        self.driver.go_on(self.stream)
        self.fake.before()
        for address, nbytes in binding.addresses:
            self.driver._inside("device", address, nbytes, self.device)
        self.real.run_with_iobinding(binding.binding, options)


class FakeRuntime:
    """Opens FakeSessions: an Opener. What is set here holds for all of them."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.provider = "CUDAExecutionProvider"
        self.refuses = False  # networks with operators that cannot be captured
        self.capture_fails = False  # operators that turn out not to be capturable
        self.rounds = (
            0.0  # graphs whose 32-bit answers are larger by that part than a plain run's, as other kernels' are
        )
        self.bakes = False  # graphs that answer what was worked out when they were captured
        self.copies_inputs = False  # inputs that the processor reads, which are copied when they are bound
        self.before: Callable[[], object] = lambda: None  # every run
        self.opened: list[dict[str, str]] = []
        self.captures: list[tuple[int, str]] = []
        self.ways: Counter[str] = Counter()

    def __call__(self, path: Path, options: Any, device_options: dict[str, str]) -> FakeSession:
        assert not options.enable_mem_pattern
        self.opened.append(device_options)
        self.before()
        if self.refuses and device_options["enable_cuda_graph"] == "1":
            raise RuntimeError(REFUSAL)
        return FakeSession(self, path, options, device_options)
