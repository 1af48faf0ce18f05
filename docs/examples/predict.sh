#!/bin/sh
# Asks `digits` what an image of 8x8 pixels shows, over HTTP with curl alone: sh predict.sh [HOST:PORT]
# `classification` has the server rank the output: value:index:label, the largest first.
set -eu
pixels='
  0,  1,  8, 10, 14, 10,  0, 0,
  0, 12, 10,  6,  6, 16,  2, 0,
  0,  3,  0,  0,  7, 14,  1, 0,
  0,  0,  0,  0,  9, 11,  0, 0,
  0,  0,  0,  0,  2, 16,  1, 0,
  0,  0,  0,  0,  0,  8, 12, 0,
  0,  0,  4,  0,  2, 11,  9, 0,
  0,  0, 12, 16, 14, 12,  4, 0'
answer=$(curl --silent --show-error --fail-with-body --max-time 2 "${1:-localhost:8000}/v2/models/digits/infer" -d '{
  "inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": ['"$pixels"']}],
  "outputs": [{"name": "logits", "parameters": {"classification": 1}}]
}') || { echo "predict: $answer" >&2; exit 1; }
echo "$answer" | sed -E 's/.*"data":\["([^:]*):([0-9]+):([^"]*)"\].*/\1 \3/' | while read -r logit label; do
    LC_ALL=C printf 'digit %s, logit %.3f\n' "$label" "$logit"
done
