"""h2spec (HTTP/2 and HPACK, case by case, --strict) against the direct transport, plain and over TLS.

h2spec asks for `/` by GET, which is no method of gRPC: it is answered at once, by headers alone. What fails is listed
with the reason; a case that fails and is not listed fails the test.
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tests.conformance.conftest import TOOLS
from tests.conformance.tool import Tool
from tests.service.certificates import Authority

from forwardpass.testing.server_process import ServerProcess

HEADERS_ALONE = "it waits for a DATA frame, and the answer to a path that is no method is headers alone"
IGNORED = (
    "libnghttp2 ignores what comes for a stream that is closed: the client may have sent it before it heard of that"
)
IDLE_RESET = "old C-core clients reset streams whose headers they never sent; it is counted, and bounded"
PRIORITIES = "libnghttp2 ignores PRIORITY, which RFC 9113 deprecates"
ARGUED = {
    ("generic/2", "Sends a WINDOW_UPDATE frame on half-closed (remote) stream"): HEADERS_ALONE,
    ("generic/2", "Sends a PRIORITY frame on half-closed (remote) stream"): HEADERS_ALONE,
    (
        "http2/4.2",
        "Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE",
    ): "what it sends is within the frame size that the server allows",
    ("http2/5.1", "idle: Sends a RST_STREAM frame"): IDLE_RESET,
    ("http2/6.4", "Sends a RST_STREAM frame on a idle stream"): IDLE_RESET,
    ("http2/5.1", "closed: Sends a DATA frame after sending RST_STREAM frame"): IGNORED,
    ("http2/5.1", "closed: Sends a HEADERS frame after sending RST_STREAM frame"): IGNORED,
    ("http2/5.1", "closed: Sends a DATA frame"): IGNORED,
    ("http2/5.1", "closed: Sends a HEADERS frame"): IGNORED,
    # These are noticed as long as the answer has not left: they fail where it was quicker than the next frame.
    ("http2/5.1", "half closed (remote): Sends a DATA frame"): IGNORED,
    ("http2/5.1", "half closed (remote): Sends a HEADERS frame"): IGNORED,
    ("http2/6.1", 'Sends a DATA frame on the stream that is not in "open" or "half-closed (local)" state'): IGNORED,
    ("http2/8.1", "Sends a second HEADERS frame without the END_STREAM flag"): IGNORED,
    ("http2/5.1.1", "Sends stream identifier that is numerically smaller than previous"): IGNORED,
    (
        "http2/5.1.2",
        "Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded",
    ): "each is answered at once, so that the limit is never reached",
    ("http2/5.3.1", "Sends PRIORITY frame that depend on itself"): PRIORITIES,
    ("http2/6.3", "Sends a PRIORITY frame with 0x0 stream identifier"): PRIORITIES,
    (
        "http2/6.9.1",
        "Sends multiple WINDOW_UPDATE frames increasing the flow control window to above 2^31-1 on a stream",
    ): "the connection is closed instead of the stream: no client that works does this",
    ("http2/8.1.2.1", "Sends a HEADERS frame that contains a pseudo-header field as trailers"): IGNORED,
}
CASES = 147


@pytest.fixture
def h2spec() -> Tool:
    found = shutil.which("h2spec", path=f"{TOOLS / 'bin'}:{Path.home() / 'go' / 'bin'}") or shutil.which("h2spec")
    if found is None:
        pytest.skip("h2spec is not there: go install github.com/summerwind/h2spec/cmd/h2spec@latest")
    return Tool(Path(found))


@pytest.mark.slow
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_what_fails_is_argued(h2spec: Tool, digits_repository: Path, tmp_path: Path, tls: bool) -> None:
    options, flags = [], []
    if tls:
        pair = Authority(tmp_path / "tls").issue("localhost")
        options = ["--tls-certificate", str(pair.certificate), "--tls-key", str(pair.key)]
        flags = ["-t", "-k"]
    report = tmp_path / "report.xml"
    with ServerProcess(digits_repository, "--transport", "direct", *options) as server:
        host, _, port = server.address.rpartition(":")
        h2spec.run("--strict", "-h", host, "-p", port, "-o", "1", "-j", report, *flags, check=False)
        assert server.returncode is None
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        (case.attrib["package"], case.attrib["classname"]) for case in cases if len(case) and case[0].tag != "skipped"
    }
    print(f"{len(cases)} cases, {len(failed)} failed")
    assert len(cases) == CASES
    assert failed <= ARGUED.keys()
    assert not [line for line in server.lines if "Traceback" in line]
