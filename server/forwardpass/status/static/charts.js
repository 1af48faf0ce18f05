// Small line charts as inline SVG, drawn at the size that their place has. Pure, but for the element they draw in.

import { make } from "./format.js";

const SPACE = "http://www.w3.org/2000/svg";
const GAP = 3.5; // seconds between two samples, beyond which nobody looked: the line breaks

function draw(tag, attributes, text) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function fresh(host, width, height, label) {
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  host.replaceChildren(svg);
  return svg;
}

// The least round number that is not below `value`.
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

// The unbroken stretches of a series, as lists of [x, y].
function stretches(ages, values, x, y) {
  const found = [[]];
  let before = null;
  values.forEach((value, place) => {
    if (value === null || (before !== null && before - ages[place] > GAP)) {
      if (found.at(-1).length) found.push([]);
    }
    if (value !== null) found.at(-1).push([x(ages[place]), y(value)]);
    before = ages[place];
  });
  return found.filter((points) => points.length);
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// series: [{ name, values, style, area }]; ages in seconds, oldest first.
export function plot(host, ages, series, format, label) {
  const width = Math.max(220, Math.floor(host.clientWidth)) || 400;
  const height = 168;
  const [left, right, top, bottom] = [62, 10, 10, 24];
  const span = Math.max(30, Math.ceil((ages[0] ?? 0) / 30) * 30);
  const highest = ceiling(Math.max(0, ...series.flatMap((one) => one.values.filter((v) => v !== null))));
  const x = (age) => left + (1 - age / span) * (width - left - right);
  const y = (value) => top + (1 - value / highest) * (height - top - bottom);
  const svg = fresh(host, width, height, label);
  for (const share of [0, 0.5, 1]) {
    const at = y(share * highest);
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
    svg.append(draw("text", { class: "end", x: left - 8, y: at + 4 }, share ? format(share * highest) : "0"));
  }
  for (const share of [0, 0.5, 1]) {
    const age = span * (1 - share);
    const told = age ? `${age < 60 ? `${age} s` : `${age / 60} min`} ago` : "now";
    const side = share === 1 ? "end" : share ? "middle" : "start";
    svg.append(draw("text", { class: side, x: x(age), y: height - 6 }, told));
  }
  for (const one of series) {
    for (const points of stretches(ages, one.values, x, y)) {
      if (one.area) {
        const ends = `L${points.at(-1)[0].toFixed(1)} ${y(0)}L${points[0][0].toFixed(1)} ${y(0)}Z`;
        svg.append(draw("path", { class: `area ${one.style}`, d: path(points) + ends }));
      }
      svg.append(draw("path", { class: `line ${one.style}`, d: path(points) }));
    }
    const last = one.values.at(-1);
    if (last !== null && last !== undefined) {
      svg.append(draw("circle", { class: `dot ${one.style}`, cx: x(ages.at(-1)), cy: y(last), r: 3.2 }));
    }
  }
}

export function spark(host, values, label) {
  const [width, height] = [120, 32];
  const svg = fresh(host, width, height, label);
  const known = values.filter((value) => value !== null);
  if (known.length < 2) return;
  const highest = Math.max(...known) || 1;
  const x = (place) => 2 + (place / Math.max(values.length - 1, 1)) * (width - 6);
  const y = (value) => 4 + (1 - value / highest) * (height - 8);
  const ages = values.map((_, place) => values.length - 1 - place);
  for (const points of stretches(ages, values, (age) => x(values.length - 1 - age), y)) {
    svg.append(draw("path", { class: "area s0", d: `${path(points)}L${points.at(-1)[0]} ${height}L${points[0][0]} ${height}Z` }));
    svg.append(draw("path", { class: "line s0", d: path(points) }));
  }
  if (values.at(-1) !== null) {
    svg.append(draw("circle", { class: "dot s0", cx: x(values.length - 1), cy: y(values.at(-1)), r: 2.6 }));
  }
}

// The two quantiles of a stage on one logarithmic scale, 10 µs to 10 s; without a style, the scale itself.
export function span(host, p50, p99, style) {
  const [width, height] = [Math.max(120, Math.floor(host.clientWidth)) || 300, 22];
  const svg = fresh(host, width, height, "");
  svg.removeAttribute("role");
  svg.setAttribute("aria-hidden", "true");
  const x = (value) => 16 + Math.min(1, Math.max(0, (Math.log10(value) + 5) / 6)) * (width - 32);
  for (const [power, told] of ["10 µs", "100 µs", "1 ms", "10 ms", "100 ms", "1 s", "10 s"].entries()) {
    const place = x(10 ** (power - 5));
    const room = width > 420 || (width > 260 ? power % 2 === 0 : power === 2 || power === 5);
    if (!style && room) svg.append(draw("text", { class: "middle", x: place, y: 16 }, told));
    if (style) svg.append(draw("line", { class: "grid", x1: place, x2: place, y1: 0, y2: height }));
  }
  if (!p50 || !p99) return;
  svg.append(draw("line", { class: `reach ${style}`, x1: x(p50), x2: x(p99), y1: 11, y2: 11 }));
  svg.append(draw("circle", { class: `dot ${style}`, cx: x(p50), cy: 11, r: 5 }));
  svg.append(draw("circle", { class: `ring ${style}`, cx: x(p99), cy: 11, r: 4 }));
}

// A row of numbers as a square picture; null where its length is no square from 4×4 to 40×40.
export function picture(values) {
  const side = Math.sqrt(values.length);
  if (!Number.isInteger(side) || side < 4 || side > 40 || values.some((v) => typeof v !== "number")) return null;
  const low = Math.min(...values);
  const reach = Math.max(...values) - low || 1;
  const svg = draw("svg", { viewBox: `0 0 ${side} ${side}`, class: "picture", role: "img", "aria-label": `the row as a picture of ${side} by ${side}` });
  values.forEach((value, place) => {
    const share = (value - low) / reach;
    if (share > 0.01) {
      svg.append(draw("rect", { class: "ink", x: place % side, y: Math.floor(place / side), width: 1.02, height: 1.02, "fill-opacity": share.toFixed(2) }));
    }
  });
  return svg;
}

export function key(host, series) {
  if (host.childElementCount) return;
  host.append(...series.map(([style, name]) => make("span", { className: `key ${style}` }, name)));
}
