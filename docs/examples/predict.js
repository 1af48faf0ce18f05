// Asks `digits` what an image of 8x8 pixels shows, over gRPC: node predict.js [ADDRESS]
//
// npm install @grpc/grpc-js @grpc/proto-loader; the .proto files are read as they are, from this repository's proto/.
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const PIXELS = [
  0,  1,  8, 10, 14, 10,  0, 0,
  0, 12, 10,  6,  6, 16,  2, 0,
  0,  3,  0,  0,  7, 14,  1, 0,
  0,  0,  0,  0,  9, 11,  0, 0,
  0,  0,  0,  0,  2, 16,  1, 0,
  0,  0,  0,  0,  0,  8, 12, 0,
  0,  0,  4,  0,  2, 11,  9, 0,
  0,  0, 12, 16, 14, 12,  4, 0,
];

const folder = path.join(__dirname, "..", "..", "proto");
const proto = loader.loadSync("grpc_service.proto", { includeDirs: [folder], keepCase: true, longs: Number });
const { GRPCInferenceService } = grpc.loadPackageDefinition(proto).inference;
const client = new GRPCInferenceService(process.argv[2] || "localhost:8001", grpc.credentials.createInsecure());

const request = {
  model_name: "digits",
  inputs: [{ name: "x", datatype: "FP32", shape: [1, 64] }],
  raw_input_contents: [Buffer.from(new Float32Array(PIXELS).buffer)],
};
client.ModelInfer(request, { deadline: Date.now() + 2000 }, (error, answer) => {
  client.close();
  if (error) {
    console.error(`predict: ${grpc.status[error.code]}: ${error.details}`);
    process.exitCode = 1;
    return;
  }
  const raw = answer.raw_output_contents[0];
  const logits = Array.from({ length: raw.length / 4 }, (_, i) => raw.readFloatLE(4 * i));
  const best = logits.indexOf(Math.max(...logits));
  console.log(`digit ${best}, logit ${logits[best].toFixed(3)}`);
});
