#!/bin/sh
# A foreign opinion on throughput: h2load (nghttp2, in C) with one ModelInfer body, closed loop.
#
#     tests/load/h2load.sh HOST:PORT MODEL [SECONDS] [CONNECTIONS] [STREAMS]
#     METRICS=http://HOST:8002/metrics tests/load/h2load.sh ...
#
# Purpose: to see that the throughput which `forwardpass loadtest` tells is not its own invention. h2load is fast, but it
# knows HTTP and not gRPC: it counts refusals as successes (their HTTP status is 200), sends one body again and again,
# waits for answers before it sends more, and counts latency from when it sent. So read its rate, not its latencies. One
# call is made before, and must be answered; with METRICS the server's own counts over the same time are told as well
# (they are of all its clients).
# Needs h2load (Debian: nghttp2-client) and Python with forwardpass, which makes the body from the model's metadata.
set -eu
if [ $# -lt 2 ]; then
    sed -n '3,4s/^#  *//p' "$0" >&2
    exit 2
fi
target=$1 model=$2 seconds=${3:-5} connections=${4:-4} streams=${5:-16}
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" - "$target" "$model" >"$folder/body" <<'PY'
import sys
from forwardpass.errors import ForwardpassError
from forwardpass.loadtest import request_bodies
try:
    requests = request_bodies.make(request_bodies.info(sys.argv[1], sys.argv[2]), "", {1: 1.0}, None, 0)
    request_bodies.answers(sys.argv[1], requests, False)
except ForwardpassError as error:
    sys.exit(f"h2load.sh: {error}")
message = requests.messages[0]
sys.stdout.buffer.write(b"\0" + len(message).to_bytes(4, "big") + message)
PY

counts() { # what the server has answered so far, a line for each status
    [ -z "${METRICS:-}" ] || "$python" - "$METRICS" "$model" <<'PY'
import sys
from forwardpass.loadtest import server_metrics
for (name, labels), value in sorted((server_metrics.scrape(sys.argv[1]) or {}).items(), key=str):
    if name == "forwardpass_requests_total" and ("model", sys.argv[2]) in labels:
        print(dict(labels)["code"], int(value))
PY
}

counts >"$folder/before"
h2load -t1 -c"$connections" -m"$streams" -D"$seconds" -d"$folder/body" \
    -H 'content-type: application/grpc' -H 'te: trailers' \
    "http://$target/inference.GRPCInferenceService/ModelInfer"
counts | while read -r code count; do
    before=$(sed -n "s/^$code //p" "$folder/before")
    echo "the server counted: $((count - ${before:-0})) $code"
done
