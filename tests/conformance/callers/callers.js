// Calls servers by turns (round_robin, no health checks, no retries) from many loops until standard input ends, then
// prints how many calls were answered and how many failed, by text, as JSON.
//
// callers.js ADDRESS,ADDRESS... REQUEST_FILE CALLERS, where the file has the message of a ModelInfer. @grpc/grpc-js is
// found by NODE_PATH.
const fs = require("fs");
const grpc = require("@grpc/grpc-js");

const [addresses, file, callers] = process.argv.slice(2);
const request = fs.readFileSync(file);
const same = (value) => value;
const found = { ok: 0, failed: {} };
let over = false;

const client = new grpc.Client(`ipv4:${addresses}`, grpc.credentials.createInsecure(), {
  "grpc.enable_http_proxy": 0,
  "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
});

function call() {
  return new Promise((resolve) => {
    client.makeUnaryRequest("/inference.GRPCInferenceService/ModelInfer", same, same, request, (error) => {
      if (error === null) {
        found.ok += 1;
      } else {
        found.failed[error.message] = (found.failed[error.message] || 0) + 1;
      }
      resolve();
    });
  });
}

async function callOn() {
  while (!over) await call();
}

process.stdin.resume();
process.stdin.on("end", () => (over = true));
client.waitForReady(Date.now() + 30000, async (error) => {
  if (error) throw error;
  await Promise.all(Array.from({ length: Number(callers) }, callOn));
  console.log(JSON.stringify(found));
  process.exit(0);
});
