// Draws a dump of the flight recorder: when requests waited, ran and were answered, in lanes that share one axis of time.
// Times are in microseconds since the first event. D is what timeline_page.py wrote:
//   lanes     [model, instance], a lane each; models: names; closed: why batches close
//   batches   [lane, closed, taken, run, ended, done, requests, answered, matrices, [arrival, rows, id, deadline, outcome]...]
//   refused   [model, time, requests, reason]
"use strict";
const D = JSON.parse(document.getElementById("flight").textContent);
const root = document.getElementById("timeline"), canvas = root.querySelector("canvas"), tip = document.getElementById("tip");
const ctx = canvas.getContext("2d"), detail = document.getElementById("detail");
const LEFT = 132, RIGHT = 12, OVERVIEW = 56, AXIS = 22, LANE = 24, GAP = 10, LINES = 20000;
const style = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
let C = {};
const colours = () => { for (const n of ["bg", "card", "text", "soft", "grid", "wait", "bad", "answer", "pick", "s0", ...D.closed]) C[n] = style(n); };

const batches = D.batches.map((b, i) => ({ i, lane: b[0], model: D.lanes[b[0]][0], closed: D.closed[b[1]], taken: b[2], run: b[3],
  ended: b[4], done: b[5], requests: b[6], answered: b[7], matrices: b[8], each: b.slice(9).map(r => ({ arrival: r[0], rows: r[1],
    id: r[2], deadline: r[3], outcome: r[4] })) }));
for (const b of batches) {
  for (const r of b.each) r.batch = b;
  b.first = b.each.reduce((t, r) => Math.min(t, r.arrival), b.taken);
}
const END = Math.max(D.span, 1);

// Each waiting request gets the lowest line that is free, so that the height of the lines is the number that wait.
const waits = D.models.map(() => []), depth = D.models.map(() => 1);
for (const b of batches) for (const r of b.each) waits[b.model].push(r);
waits.forEach((list, m) => {
  list.sort((a, b) => a.arrival - b.arrival);
  const free = [], ends = [];
  let next = 0;
  for (const r of list) {
    while (ends.length && ends[0][0] <= r.arrival) free.push(pop(ends)[1]);
    if (free.length) { free.sort((a, b) => b - a); r.line = free.pop(); } else r.line = next++;
    push(ends, [r.batch.taken, r.line]);
  }
  depth[m] = Math.max(next, 1);
});
function push(heap, item) {
  heap.push(item);
  for (let i = heap.length - 1; i;) {
    const up = (i - 1) >> 1;
    if (heap[up][0] <= heap[i][0]) break;
    [heap[up], heap[i]] = [heap[i], heap[up]]; i = up;
  }
}
function pop(heap) {
  const top = heap[0], last = heap.pop();
  if (heap.length) {
    heap[0] = last;
    for (let i = 0; ;) {
      let low = 2 * i + 1;
      if (low >= heap.length) break;
      if (low + 1 < heap.length && heap[low + 1][0] < heap[low][0]) low++;
      if (heap[i][0] <= heap[low][0]) break;
      [heap[low], heap[i]] = [heap[i], heap[low]]; i = low;
    }
  }
  return top;
}

// Where everything is, from the top: the overview, the axis, then each model's queue and its instances.
let y = OVERVIEW + AXIS;
const place = D.models.map((name, m) => {
  const queue = { top: y + 18, height: Math.max(26, Math.min(150, depth[m] * 4)) };
  y = queue.top + queue.height + 5;
  const lanes = D.lanes.map((lane, i) => lane[0] === m ? i : -1).filter(i => i >= 0);
  const top = lanes.map(i => { const at = y; y += LANE; return [i, at]; });
  y += GAP;
  return { queue, lanes: new Map(top) };
});
const HEIGHT = y + 4;
const byLane = D.lanes.map((_, i) => batches.filter(b => b.lane === i));

let from = 0, to = END, width = 800, pinned = null, over = null;
const x = t => LEFT + (t - from) / (to - from) * (width - LEFT - RIGHT);
const at = px => from + (px - LEFT) / (width - LEFT - RIGHT) * (to - from);
const span = us => us >= 1e6 ? (us / 1e6).toPrecision(3) + " s" : us >= 1e3 ? (us / 1e3).toPrecision(3) + " ms" : us.toPrecision(3).replace(/\.0+$/, "") + " µs";
const escape = s => String(s).replace(/[&<>"]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function view(a, b) {
  const wide = Math.min(Math.max(b - a, 20), END * 1.04);
  const middle = (a + b) / 2;
  from = Math.max(-END * 0.02, Math.min(middle - wide / 2, END * 1.02 - wide));
  to = from + wide;
  draw();
}

let queued = false;
function draw() { if (!queued) { queued = true; requestAnimationFrame(paint); } }

function paint() {
  queued = false;
  const ratio = window.devicePixelRatio || 1;
  width = root.clientWidth;
  canvas.width = width * ratio; canvas.height = HEIGHT * ratio; canvas.style.height = HEIGHT + "px";
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, HEIGHT);
  ctx.font = "11px system-ui, sans-serif"; ctx.textBaseline = "middle";
  overview(); axis();
  ctx.save(); ctx.beginPath(); ctx.rect(LEFT, OVERVIEW, width - LEFT - RIGHT, HEIGHT); ctx.clip();
  D.models.forEach((_, m) => { queue(m); place[m].lanes.forEach((top, lane) => runs(lane, top)); });
  refused(); picked();
  ctx.restore();
  labels();
}

function overview() {
  const wide = width - LEFT - RIGHT, tall = OVERVIEW - 16, worst = new Float64Array(Math.ceil(wide) + 1);
  for (const b of batches) {
    const px = Math.max(0, Math.min(wide, Math.round(b.done / END * wide)));
    worst[px] = Math.max(worst[px], b.done - b.first);
  }
  const most = worst.reduce((a, b) => Math.max(a, b), 1);
  ctx.fillStyle = C.bg; ctx.fillRect(LEFT, 6, wide, tall);
  ctx.fillStyle = C.s0;
  worst.forEach((v, px) => { if (v) { const h = Math.max(1.5, v / most * (tall - 2)); ctx.fillRect(LEFT + px, 6 + tall - h, 1.6, h); } });
  const a = LEFT + Math.max(0, from / END) * wide, b = LEFT + Math.min(1, to / END) * wide;
  ctx.fillStyle = C.text; ctx.globalAlpha = 0.12; ctx.fillRect(LEFT, 6, a - LEFT, tall); ctx.fillRect(b, 6, LEFT + wide - b, tall);
  ctx.globalAlpha = 1; ctx.strokeStyle = C.soft; ctx.strokeRect(a + 0.5, 6.5, Math.max(2, b - a - 1), tall - 1);
  ctx.fillStyle = C.soft; ctx.textAlign = "right";
  ctx.fillText("slowest answer", LEFT - 8, 18); ctx.fillText(span(most), LEFT - 8, 33);
}

function axis() {
  const rough = (to - from) / Math.max(3, (width - LEFT - RIGHT) / 110), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
  ctx.textAlign = "center"; ctx.strokeStyle = C.grid; ctx.fillStyle = C.soft; ctx.lineWidth = 1;
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
    const px = Math.round(x(t)) + 0.5;
    ctx.globalAlpha = 0.6; ctx.beginPath(); ctx.moveTo(px, OVERVIEW + AXIS - 6); ctx.lineTo(px, HEIGHT); ctx.stroke(); ctx.globalAlpha = 1;
    if (px > LEFT + 8) ctx.fillText(tick(t, step), px, OVERVIEW + 5);
  }
}
function tick(t, step) {
  const [size, unit] = END >= 2e6 && step >= 1e4 ? [1e6, " s"] : step >= 100 || Math.abs(t) >= 1e5 ? [1e3, " ms"] : [1, " µs"];
  return (t / size).toFixed(Math.max(0, Math.ceil(-Math.log10(step / size) - 1e-9))) + unit;
}

// A band is as high as the lines that are in view, so that a quiet stretch beside a burst can be read.
const shown = D.models.map(() => 1);
const lineHeight = m => Math.min(place[m].queue.height / shown[m], 12);
const thickness = each => each < 2.5 ? each : Math.min(each * 0.72, 7);

function queue(m) {
  const { top, height } = place[m].queue;
  ctx.fillStyle = C.bg; ctx.fillRect(LEFT, top, width - LEFT - RIGHT, height);
  const seen = waits[m].filter(r => r.batch.taken >= from && r.arrival <= to);
  shown[m] = seen.reduce((most, r) => Math.max(most, r.line + 1), 1);
  const each = lineHeight(m), thick = thickness(each);
  const every = Math.max(1, Math.ceil(seen.length / LINES));
  for (let i = 0; i < seen.length; i += every) {
    const r = seen[i], a = Math.max(x(r.arrival), LEFT - 2), b = x(r.batch.taken);
    ctx.fillStyle = r.outcome ? C.bad : C.wait;
    ctx.fillRect(a, top + height - (r.line + 1) * each, Math.max(1, b - a), thick);
  }
}

function runs(lane, top) {
  const tall = LANE - 6, least = 1 / (width - LEFT - RIGHT) * (to - from);
  let painted = -1e9;
  ctx.textAlign = "center";
  for (const b of byLane[lane]) {
    if (b.done < from || b.taken > to || b.done < painted) continue;
    const a = x(b.taken), mid = x(Math.min(b.taken + b.run, b.ended)), c = x(b.done);
    ctx.fillStyle = C.answer; ctx.fillRect(mid, top + 4, Math.max(0.5, c - mid), tall - 8);
    ctx.fillStyle = C[b.closed]; ctx.fillRect(a, top, Math.max(1, mid - a), tall);
    if (b.answered < b.requests) { ctx.fillStyle = C.bad; ctx.fillRect(a, top + tall + 1, Math.max(2, c - a), 2.5); }
    const left = Math.max(a, LEFT), right = Math.min(mid, width - RIGHT), wide = right - left, word = `${b.requests}`;
    if (wide > 20) { ctx.fillStyle = "#fff"; ctx.fillText(wide > 110 ? `${count(b.requests, "request")}, ${count(rows(b), "row")}` : word, (left + right) / 2, top + tall / 2 + 0.5); }
    if (c - a < 1) painted = b.taken + least * 0.5;
  }
}
const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const rows = b => b.requests === 1 && b.answered ? b.matrices.reduce((s, n) => s + n, 0) : b.matrices[0] || 0;

function refused() {
  ctx.fillStyle = C.bad;
  for (const [m, time, times] of D.refused) {
    if (time < from || time > to || m < 0) continue;
    const px = x(time), tall = 4 + Math.min(9, Math.log2(1 + times) * 2);
    ctx.beginPath(); ctx.moveTo(px - 3, place[m].queue.top - 1 - tall); ctx.lineTo(px + 3, place[m].queue.top - 1 - tall); ctx.lineTo(px, place[m].queue.top - 1); ctx.fill();
  }
}

function picked() {
  for (const b of new Set([pinned, over && (over.batch || over)])) {
    if (!b) continue;
    const { queue: q } = place[b.model], each = lineHeight(b.model), top = place[b.model].lanes.get(b.lane);
    ctx.strokeStyle = ctx.fillStyle = C.pick; ctx.lineWidth = 1.5;
    for (const r of b.each) ctx.fillRect(x(r.arrival), q.top + q.height - (r.line + 1) * each, Math.max(1, x(b.taken) - x(r.arrival)), Math.max(1, thickness(each)));
    ctx.strokeRect(x(b.taken) - 1, top - 1, Math.max(3, x(b.done) - x(b.taken)) + 2, LANE - 4);
    ctx.globalAlpha = 0.35; ctx.beginPath(); ctx.moveTo(x(b.taken), q.top); ctx.lineTo(x(b.taken), top); ctx.stroke(); ctx.globalAlpha = 1;
  }
}

function labels() {
  D.models.forEach((name, m) => {
    ctx.textAlign = "left"; ctx.fillStyle = C.text; ctx.font = "600 12px system-ui, sans-serif";
    ctx.fillText(name, 10, place[m].queue.top - 9);
    ctx.font = "11px system-ui, sans-serif"; ctx.fillStyle = C.soft; ctx.textAlign = "right";
    ctx.fillText("waiting", LEFT - 8, place[m].queue.top + 9);
    ctx.fillText(`up to ${shown[m]}`, LEFT - 8, place[m].queue.top + 22);
    place[m].lanes.forEach((top, lane) => {
      const i = D.lanes[lane][1];
      ctx.fillText(i < 0 ? "receiving thread" : `instance ${i}`, LEFT - 8, top + (LANE - 6) / 2);
    });
  });
}

function find(px, py) {
  const t = at(px), near = 3 * (to - from) / width;
  for (let m = 0; m < D.models.length; m++) {
    for (const [lane, top] of place[m].lanes) {
      if (py < top || py >= top + LANE) continue;
      return byLane[lane].filter(b => b.taken - near <= t && t <= b.done + near).sort((a, b) => gap(a, t) - gap(b, t))[0] || null;
    }
    const { top, height } = place[m].queue;
    if (py >= top && py < top + height) {
      const each = lineHeight(m), line = Math.floor((top + height - py) / each), reach = Math.max(1, 3 / each);
      return waits[m].filter(r => Math.abs(r.line - line) <= reach && r.arrival - near <= t && t <= r.batch.taken + near).sort((a, b) => Math.abs(a.line - line) - Math.abs(b.line - line))[0] || null;
    }
  }
  return null;
}
const gap = (b, t) => Math.max(b.taken - t, t - b.done, 0);

function words(thing) {
  const b = thing.batch || thing;
  let text = "";
  if (thing.batch) {
    text += `<b>${escape(thing.id || "a request")}</b>, ${count(thing.rows, "row")}<br><span>waited</span> ${span(b.taken - thing.arrival)} <span>of</span> ${span(b.done - thing.arrival)}`;
    if (thing.deadline !== null) text += `<br><span>deadline</span> ${span(thing.deadline - thing.arrival)} <span>after it came</span>`;
    text += `<br>${thing.outcome ? `<b>${escape(thing.outcome)}</b>` : "<span>answered</span>"}<br><span>in a batch of</span> ${b.requests}`;
  } else {
    text += `<b>${count(b.requests, "request")}, ${count(rows(b), "row")}</b><br><span>run</span> ${span(b.run)}, <span>answers</span> ${span(Math.max(0, b.done - b.taken - b.run))}<br><span>oldest waited</span> ${span(b.taken - b.first)}`;
    if (b.matrices.length > 1) text += `<br><span>matrices</span> ${b.matrices.join(", ")}`;
    if (b.answered < b.requests) text += `<br><b>${b.requests - b.answered} not answered with success</b>`;
  }
  return `${text}<br><span>closed:</span> ${escape(D.why[b.closed])}`;
}

function show(b, request) {
  pinned = b;
  const head = `<h3>Batch at ${span(b.taken)}: ${count(b.requests, "request")}, ${count(rows(b), "row")}, closed: ${escape(D.why[b.closed])}</h3>`;
  const cells = b.each.map(r => `<tr class="${r.outcome ? "bad" : ""}"><td class="id">${escape(r.id || "–")}</td><td>${r.rows}</td><td>${span(r.arrival)}</td><td>${span(b.taken - r.arrival)}</td><td>${span(b.done - r.arrival)}</td><td>${r.deadline === null ? "–" : span(r.deadline - r.arrival)}</td><td>${escape(r.outcome || "OK")}</td></tr>`).join("");
  const more = b.requests > b.each.length ? `<p class="soft">${b.requests - b.each.length} more were not recorded one by one</p>` : "";
  detail.innerHTML = `${head}<p class="soft">run ${span(b.run)}, answers ${span(Math.max(0, b.done - b.taken - b.run))}; matrices of ${b.matrices.join(", ") || "no"} rows</p><div class="scroll"><table><thead><tr><th>id</th><th>rows</th><th>arrived at</th><th>waited</th><th>answered after</th><th>deadline after</th><th>outcome</th></tr></thead><tbody>${cells}</tbody></table></div>${more}`;
  if (request !== undefined) around(b);
  draw();
}
function around(b) { const wide = Math.max(b.done - b.first, 200); view(b.first - wide * 0.6, b.done + wide * 0.6); }

const slowest = batches.flatMap(b => b.each).sort((a, b) => (b.batch.done - b.arrival) - (a.batch.done - a.arrival)).slice(0, 12);
const list = document.querySelector("#slowest tbody");
for (const r of slowest) {
  const row = list.insertRow(), b = r.batch;
  row.className = "pick";
  row.innerHTML = `<td class="id">${escape(r.id || "–")}</td><td>${escape(D.models[b.model])}</td><td>${span(b.done - r.arrival)}</td><td>${span(b.taken - r.arrival)}</td><td>${span(b.run)}</td><td>${b.requests}</td><td>${escape(D.why[b.closed])}</td><td>${escape(r.outcome || "OK")}</td>`;
  row.onclick = () => { show(b, r); root.scrollIntoView({ behavior: "smooth", block: "center" }); };
}

let drag = null;
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  const t = at(e.offsetX);
  if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) { const by = (e.deltaX || e.deltaY) / width * (to - from); view(from + by, to + by); return; }
  const by = Math.exp(Math.max(-1, Math.min(1, e.deltaY / 300)));
  view(t - (t - from) * by, t + (to - t) * by);
}, { passive: false });
canvas.addEventListener("pointerdown", e => { canvas.setPointerCapture(e.pointerId); drag = { x: e.offsetX, from, to, moved: false, above: e.offsetY < OVERVIEW - 8 }; move(e); });
canvas.addEventListener("pointermove", move);
canvas.addEventListener("pointerup", e => {
  if (drag && !drag.moved && !drag.above) { const found = find(e.offsetX, e.offsetY); if (found) show(found.batch || found); else { pinned = null; draw(); } }
  drag = null;
});
canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; over = null; draw(); });
canvas.addEventListener("dblclick", () => view(0, END));
function move(e) {
  if (drag && drag.above) {
    const t = (e.offsetX - LEFT) / (width - LEFT - RIGHT) * END, half = (to - from) / 2;
    view(t - half, t + half); return;
  }
  if (drag) {
    if (Math.abs(e.offsetX - drag.x) > 3) drag.moved = true;
    const by = (e.offsetX - drag.x) / (width - LEFT - RIGHT) * (drag.to - drag.from);
    if (drag.moved) view(drag.from - by, drag.to - by);
    return;
  }
  const found = find(e.offsetX, e.offsetY);
  if (found !== over) { over = found; draw(); }
  tip.style.display = found ? "block" : "none";
  if (found) {
    tip.innerHTML = words(found);
    tip.style.left = Math.min(e.offsetX + 14, width - tip.offsetWidth - 8) + "px";
    tip.style.top = (e.offsetY + 16 + tip.offsetHeight > HEIGHT ? Math.max(4, e.offsetY - tip.offsetHeight - 10) : e.offsetY + 16) + "px";
  }
}
document.addEventListener("keydown", e => {
  const wide = to - from, step = { ArrowLeft: [-0.2, -0.2], ArrowRight: [0.2, 0.2], "+": [0.2, -0.2], "-": [-0.3, 0.3] }[e.key];
  if (step) { e.preventDefault(); view(from + step[0] * wide, to + step[1] * wide); }
  if (e.key === "0") view(0, END);
});
document.getElementById("all").onclick = () => view(0, END);
document.getElementById("worst").onclick = () => slowest.length && show(slowest[0].batch, slowest[0]);
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours(); draw(); });
colours();
if (slowest.length) show(slowest[0].batch, slowest[0]); else view(0, END);
