#!/bin/sh
# A foreign opinion on throughput: h2load (nghttp2, in C) with one ModelInfer body, closed loop.
#
#     tests/load/h2load.sh HOST:PORT MODEL [SECONDS] [CONNECTIONS] [STREAMS]
#
# Purpose: to see that the throughput which `forwardpass loadtest` tells is not its own invention. h2load is fast, but it
# knows HTTP and not gRPC: it counts refusals as successes (their HTTP status is 200), sends one body again and again,
# waits for answers before it sends more, and counts latency from when it sent. So read its rate, not its latencies, and
# check the server's own count of OK answers beside it.
# Needs h2load (Debian: nghttp2-client) and Python with forwardpass, which makes the body from the model's metadata.
set -eu
target=$1 model=$2 seconds=${3:-5} connections=${4:-4} streams=${5:-16}
body=$(mktemp)
trap 'rm -f "$body"' EXIT
"${PYTHON:-python3}" - "$target" "$model" >"$body" <<'PY'
import sys
from forwardpass.loadtest import bodies
message = bodies.make(bodies.info(sys.argv[1], sys.argv[2]), "", {1: 1.0}, None, 0).messages[0]
sys.stdout.buffer.write(b"\0" + len(message).to_bytes(4, "big") + message)
PY
h2load -t1 -c"$connections" -m"$streams" -D"$seconds" -d"$body" -H 'content-type: application/grpc' -H 'te: trailers' \
    "http://$target/inference.GRPCInferenceService/ModelInfer"
