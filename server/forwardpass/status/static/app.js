// The status page: one stream of snapshots in, the document brought up to date. No dependencies, no build step.
// EventSource cannot bring a token, so the stream of server-sent events is read by fetch.

import { key, plot, span } from "./charts.js";
import { NONE, bytes, duration, fill, make, number, seconds, write } from "./format.js";
import { Models } from "./models.js";

const SILENCE = 6000; // milliseconds without an event, after which the connection counts as lost
const POLL = 2000; // where all places for streams are taken

const at = (id) => document.getElementById(id);
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

let connected = null;
let lastState = "";

function say(text) {
  write(at("news"), text);
}

// -- token ------------------------------------------------------------------------------------------------------------

let asking = null;

function askForToken(problem) {
  asking ??= new Promise((resolve) => {
    const dialog = at("token-dialog");
    at("token-plain").hidden = window.isSecureContext;
    write(at("token-wrong"), sessionStorage.getItem("token") ? problem : "");
    write(at("state"), "needs a token");
    at("state").dataset.state = "loading";
    at("token-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("token", at("token").value.trim());
      at("token").value = "";
      asking = null;
      at("token-again").hidden = true;
      dialog.close();
      resolve();
    };
    // Closed by Escape: the page stays as it is, with a way back.
    dialog.onclose = () => (at("token-again").hidden = asking === null);
    at("token-again").querySelector("button").onclick = () => dialog.showModal();
    dialog.showModal();
  });
  return asking;
}

// fetch with the token, if there is one; asks for one and tries again where it is refused. null: no server.
async function get(url, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    let response;
    try {
      response = await fetch(url, { ...options, headers });
    } catch {
      return null;
    }
    if (response.status !== 401 && response.status !== 403) return response;
    const problem = await response.json().catch(() => ({}));
    await askForToken(problem.error ?? "The token is refused.");
  }
}

// -- the document -----------------------------------------------------------------------------------------------------

const models = new Models(at("cards"), at("models-count"), at("skipped"), { get, say });

function tiles(host, values) {
  values.forEach(([title, value, note], place) => {
    let tile = host.children[place];
    if (!tile) {
      tile = make("div", { className: "tile" }, make("dt"), make("dd"));
      host.append(tile);
    }
    write(tile.firstChild, title);
    const shown = note ? `${value}\n${note}` : value;
    if (tile.dataset.shown !== shown) {
      tile.dataset.shown = shown;
      tile.lastChild.replaceChildren(value, ...(note ? [make("small", {}, note)] : []));
    }
  });
  while (host.children.length > values.length) host.lastChild.remove();
}

function show(snapshot) {
  const { server, traffic } = snapshot;
  const stages = traffic?.stages ?? {};
  write(at("about"), `version ${server.version}, up ${duration(server.uptime_seconds)}`);
  write(at("about-more"), `, ONNX Runtime ${server.onnxruntime}`);
  write(at("window"), snapshot.window_seconds ? `over the last ${Math.round(snapshot.window_seconds)} s` : "measuring …");
  state(server.ready ? "ready" : "not ready", server.ready ? "ready" : "failed");
  tiles(at("tiles"), [
    ["requests a second", number(traffic?.requests_per_second)],
    ["p50, arrival to answer", seconds(stages.total?.p50)],
    ["p99, arrival to answer", seconds(stages.total?.p99)],
    ["rows a batch", number(traffic?.rows_per_batch)],
    ["requests waiting", number(snapshot.queue_requests), `${number(server.in_flight_requests)} in flight`],
    ["refused or failed / s", number(traffic?.failed_per_second)],
  ]);
  showCharts(snapshot);
  models.update(snapshot);
  fill(
    at("refused-rows"),
    snapshot.refused.map((one) => [
      one.model || "none",
      one.version,
      { text: one.reason, className: "code" },
      { text: number(one.per_second), className: "number" },
      { text: number(one.total), className: "number" },
    ]),
    "Nothing was refused since the start.",
  );
  fill(
    at("error-rows"),
    snapshot.errors.map((one) => [
      { text: new Date(one.at * 1e3).toLocaleTimeString([], { hour12: false }), className: "nowrap" },
      one.model ? `${one.model} ${one.version}` : "none",
      { text: one.code, className: "code" },
      { text: one.reason, className: "code" },
      { text: number(one.times), className: "number" },
      { text: one.text, className: "text" },
    ]),
    "No request was refused or has failed.",
  );
  tiles(at("facts"), [
    ["provider", server.providers.join(", ") || "none"],
    ["processes", "1", `pid ${server.pid}`],
    ["threads", number(server.threads)],
    ["memory", bytes(server.resident_bytes)],
    ["cores in use", server.cores_used?.toFixed(2) ?? NONE, `of ${server.cores}`],
    ["open files", number(server.open_files)],
    ["bytes in flight", bytes(server.in_flight_bytes)],
  ]);
}

// What is drawn at the size of its place: again where that changes.
function showCharts(snapshot) {
  const { chart } = snapshot;
  const ages = chart.seconds_ago;
  plot(at("plot-rate"), ages, [{ values: chart.requests_per_second, style: "s0", area: true }, { values: chart.failed_per_second, style: "s1" }], number, `requests a second in the last two minutes, now ${number(chart.requests_per_second.at(-1))}`);
  plot(at("plot-latency"), ages, [{ values: chart.p99, style: "s1" }, { values: chart.p50, style: "s0", area: true }], seconds, `latency in the last two minutes, now p50 ${seconds(chart.p50.at(-1))}, p99 ${seconds(chart.p99.at(-1))}`);
  showStages(snapshot.traffic?.stages ?? {});
}

function showStages(stages) {
  const body = at("stages");
  span(at("scale"));
  for (const [place, [name, style]] of [["queue", "s2"], ["run", "s0"], ["total", "s1"]].entries()) {
    let row = body.rows[place];
    if (!row) {
      row = make("tr", {}, make("th", { scope: "row" }, name), make("td", { className: "number" }), make("td", { className: "number" }), make("td", { className: "wide" }));
      body.append(row);
    }
    write(row.cells[1], seconds(stages[name]?.p50));
    write(row.cells[2], seconds(stages[name]?.p99));
    span(row.cells[3], stages[name]?.p50, stages[name]?.p99, style);
  }
}

function state(text, kind) {
  write(at("state"), text);
  at("state").dataset.state = kind;
  if (lastState && lastState !== text) say(`The server is ${text}`);
  lastState = text;
}

function lost() {
  if (connected === false) return;
  const since = connected ? new Date().toLocaleTimeString([], { hour12: false }) : "";
  connected = false;
  document.body.classList.add("lost");
  state("no answer", "failed");
  at("notice").hidden = false;
  write(at("notice"), since ? `The server does not answer. The figures are those of ${since}; the page goes on trying.` : "The server does not answer; the page goes on trying.");
}

let latest = null;

function found(snapshot) {
  latest = snapshot;
  connected = true;
  document.body.classList.remove("lost");
  at("notice").hidden = true;
  show(snapshot);
}

// -- the stream -------------------------------------------------------------------------------------------------------

let running = null; // aborts the stream while nobody looks

async function read(response, control) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const timer = setTimeout(() => control.abort(), SILENCE);
    const { value, done } = await reader.read().finally(() => clearTimeout(timer));
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    const last = events.filter((event) => event.startsWith("data: ")).at(-1);
    if (last) found(JSON.parse(last.slice(6)));
  }
}

async function follow() {
  let wait = 500;
  for (;;) {
    if (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      continue;
    }
    running = new AbortController();
    const control = running;
    const response = await get("/status/events", { signal: control.signal });
    if (response?.ok) {
      wait = 500;
      try {
        await read(response, control);
      } catch {
        // aborted, or the connection broke: judged below
      }
      if (!document.hidden) lost();
    } else if (response?.status === 503) {
      const snapshot = await get("/status/snapshot.json");
      if (snapshot?.ok) found(await snapshot.json());
      await sleep(POLL);
      continue;
    } else if (!document.hidden) {
      lost();
    }
    await sleep(wait);
    wait = Math.min(8000, wait * 2);
  }
}

document.addEventListener("visibilitychange", () => document.hidden && running?.abort());
addEventListener("resize", () => latest && requestAnimationFrame(() => showCharts(latest)));
at("raw").addEventListener("click", async (event) => {
  // A link cannot bring a token: fetch it, and open what came.
  if (!sessionStorage.getItem("token")) return;
  event.preventDefault();
  const response = await get("/status/snapshot.json");
  if (response?.ok) window.open(URL.createObjectURL(await response.blob()), "_blank", "noopener");
});
key(at("key-rate"), [["s0", "answered"], ["s1", "refused or failed"]]);
key(at("key-latency"), [["s0", "p50"], ["s1", "p99"]]);
follow();
