// Calls a server in each way that a user does, compares every answer byte by byte, and prints the outcomes as JSON.
//
// verify.js ADDRESS FOLDER CALLS [AUTHORITY.pem]. @grpc/grpc-js is found by NODE_PATH.
const fs = require("fs");
const path = require("path");
const grpc = require("@grpc/grpc-js");

const [address, folder, calls, authority] = process.argv.slice(2);
const SERVICE = "/inference.GRPCInferenceService/";
const MARK = Buffer.from("########"); // where a call's id goes
const SMALL = Array.from({ length: 8 }, (_, i) => `small${i}`);
const LARGE = ["large4", "large8", "large16"];
const PATIENCE = 60000;
const same = (value) => value;
const files = {};
for (const name of fs.readdirSync(folder)) files[name] = fs.readFileSync(path.join(folder, name));
const found = {};
let id = 40000000;

const metadata = new grpc.Metadata();
metadata.set("x-trace", "a b,c");
metadata.set("x-token-bin", Buffer.from(Array.from({ length: 256 }, (_, i) => i)));

function connect(compression) {
  const security = authority
    ? grpc.credentials.createSsl(fs.readFileSync(authority))
    : grpc.credentials.createInsecure();
  return new grpc.Client(address, security, {
    "grpc.enable_http_proxy": 0,
    "grpc.max_receive_message_length": -1,
    "grpc.max_send_message_length": -1,
    "grpc.default_compression_algorithm": compression,
    "grpc.use_local_subchannel_pool": 1,
  });
}

function note(check, outcome) {
  found[check] = found[check] || {};
  found[check][outcome] = (found[check][outcome] || 0) + 1;
}

function marked(file, mark) {
  const copy = Buffer.from(files[file]);
  mark.copy(copy, copy.indexOf(MARK));
  return copy;
}

function wanted(name, answer) {
  const mark = Buffer.from(String(id++));
  return [marked(`${name}.request`, mark), marked(`${name}.${answer}`, mark)];
}

function unary(client, check, name, timeout = PATIENCE, cancelAfter = -1) {
  const [request, response] = wanted(name, "response");
  return new Promise((resolve) => {
    const options = { deadline: Date.now() + timeout };
    const call = client.makeUnaryRequest(
      SERVICE + "ModelInfer", same, same, request, metadata, options, (error, answer) => {
        note(check, error ? String(error.code) : answer.equals(response) ? "answered" : "wrong");
        resolve();
      });
    if (cancelAfter >= 0) setTimeout(() => call.cancel(), cancelAfter);
  });
}

function stream(client, check, names) {
  const pairs = names.map((name) => wanted(name, "streamed"));
  return new Promise((resolve) => {
    const options = { deadline: Date.now() + PATIENCE };
    const call = client.makeBidiStreamRequest(SERVICE + "ModelStreamInfer", same, same, metadata, options);
    let count = 0;
    call.on("data", (answer) => {
      note(check, count < pairs.length && answer.equals(pairs[count][1]) ? "answered" : "wrong");
      count += 1;
    });
    call.on("error", (error) => {
      note(check, String(error.code));
      resolve();
    });
    call.on("end", () => {
      if (count !== pairs.length) note(check, `ended after ${count}`);
      resolve();
    });
    let sent = 0;
    const send = () => {
      while (sent < pairs.length) if (!call.write(pairs[sent++][0])) return call.once("drain", send);
      call.end();
    };
    send();
  });
}

async function sideBySide(jobs, loops = 8) {
  const queue = [...jobs];
  const work = async () => {
    while (queue.length) await queue.shift()();
  };
  await Promise.all(Array.from({ length: loops }, work));
}

const many = (count, job) => Array.from({ length: count }, (_, i) => () => job(i));
const mixed = (jobs) => jobs.map((job) => [Math.random(), job]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);

async function main() {
  const client = connect(0);
  const smalls = (check, count, by = client) => many(count, (i) => unary(by, check, SMALL[i % 8]));
  await sideBySide(smalls("unary", calls));
  for (const [check, algorithm] of [["deflate", 1], ["gzip", 2]]) {
    const compressing = connect(algorithm);
    await sideBySide([...smalls(check, calls / 4, compressing), () => unary(compressing, check, "large4")]);
    compressing.close();
  }
  await sideBySide(many(9, (i) => unary(client, "large", LARGE[i % 3])), 3);
  await sideBySide(many(4, () => stream(client, "stream", Array.from({ length: calls / 4 }, (_, i) => SMALL[i % 8]))));
  if (files["large4.streamed"]) {
    await sideBySide(many(2, () => stream(client, "large stream", [...LARGE, ...LARGE])), 2);
  }
  const short = many(40, () => unary(client, "deadlines", "slow", 1 + Math.floor(20 * Math.random())));
  await sideBySide(mixed([...short, ...smalls("beside deadlines", 80)]));
  const names = ["slow", "large4", "small0"];
  const cancelled = many(120, (i) => unary(client, "cancels", names[i % 3], PATIENCE, i % 6));
  await sideBySide(mixed([...cancelled, ...smalls("beside cancels", 80)]));
  for (const [check, name, method] of [
    ["missing model", "missing", "ModelInfer"],
    ["missing method", "missing", "NoMethod"],
    ["oversized", "oversized", "ModelInfer"],
  ]) {
    await new Promise((resolve) => {
      client.makeUnaryRequest(SERVICE + method, same, same, files[`${name}.request`], (error) => {
        note(check, error ? String(error.code) : "answered");
        resolve();
      });
    });
  }
  await sideBySide(smalls("after all", 80));
  client.close();
  console.log(JSON.stringify(found));
}

main();
