// A foreign opinion on latency under load: k6 with its gRPC module, open loop (constant arrival rate).
//
//     k6 run -e TARGET=127.0.0.1:8001 -e MODEL=digits -e WIDTH=64 -e RATE=500 -e SECONDS=10 tests/load/k6.js
//
// Purpose: for teams that test everything with k6, and as a check of `forwardpass loadtest` at rates that both can make.
// k6's arrival rate is open-loop, but its latency counts from when a virtual user sent, so a shortage of virtual users
// (dropped_iterations in its summary, held at 0 by a threshold below) is where queueing would hide. It makes some
// thousand calls a second on a core; for more, use `forwardpass loadtest`. Tried with k6 1.1.0 at 50 calls a second.
import { check } from "k6";
import encoding from "k6/encoding";
import grpc from "k6/net/grpc";

const rate = Number(__ENV.RATE || 500);
const width = Number(__ENV.WIDTH || 64);
const client = new grpc.Client();
client.load(["../../proto"], "grpc_service.proto");

export const options = {
  scenarios: {
    open: {
      executor: "constant-arrival-rate",
      rate,
      timeUnit: "1s",
      duration: `${__ENV.SECONDS || 10}s`,
      preAllocatedVUs: Math.max(50, Math.ceil(rate / 10)),
    },
  },
  thresholds: { checks: ["rate==1"], dropped_iterations: ["count==0"] },
};

const row = new Float32Array(width).map((_, i) => Math.sin(i));
const request = {
  model_name: __ENV.MODEL || "digits",
  inputs: [{ name: __ENV.INPUT || "x", datatype: "FP32", shape: [1, width] }],
  raw_input_contents: [encoding.b64encode(row.buffer)],
};
let connected = false;

export default function () {
  if (!connected) {
    client.connect(__ENV.TARGET || "127.0.0.1:8001", { plaintext: true });
    connected = true;
  }
  const answer = client.invoke("inference.GRPCInferenceService/ModelInfer", request);
  check(answer, { OK: (a) => a && a.status === grpc.StatusOK });
}
