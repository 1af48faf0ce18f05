// Numbers with units, as people read them; and elements made in one line. No state.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });

export const NONE = "–"; // where there is no figure

export function number(value) {
  if (value === null || value === undefined) return NONE;
  return Math.abs(value) >= 100 ? whole.format(value) : short.format(value);
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0 s";
  for (const [factor, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) {
    if (value >= 0.9995 * factor) return `${number(value / factor)} ${unit}`;
  }
  return `${number(value * 1e6)} µs`;
}

// A small number as scientists write it: 0.00001 is hard to count.
export function tiny(value) {
  return value && Math.abs(value) < 1e-3 ? value.toExponential().replace(/(\.\d)\d+/, "$1") : String(value);
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  for (const [factor, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= factor) return `${number(value / factor)} ${unit}`;
  }
  return `${value} B`;
}

export function duration(value) {
  const minutes = Math.floor(value / 60);
  if (minutes < 1) return `${Math.floor(value)} s`;
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 60 * 48) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 60 / 24)} days`;
}

export function shape(sizes) {
  return `[${sizes.map((size, axis) => (size < 0 ? (axis ? "any" : "B") : size)).join(", ")}]`;
}

// make("td", { className: "number" }, "12", other) – texts are never read as HTML.
export function make(tag, properties = {}, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...content);
  return element;
}

// Change a text only where it differs, so that a selection or a reader's place stays.
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Bring a list of rows, each a list of cells, into a table's body, reusing what is there.
export function fill(body, rows, empty) {
  const columns = body.closest("table").querySelectorAll("thead th").length;
  if (!rows.length) {
    if (body.dataset.empty !== "yes") {
      body.replaceChildren(make("tr", {}, make("td", { colSpan: columns, className: "soft" }, empty)));
      body.dataset.empty = "yes";
    }
    return;
  }
  if (body.dataset.empty === "yes") body.replaceChildren();
  body.dataset.empty = "no";
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, place) => {
    const row = body.rows[place] || body.insertRow();
    cells.forEach((cell, column) => {
      const td = row.cells[column] || row.insertCell();
      write(td, cell.text ?? cell);
      td.className = cell.className ?? "";
    });
  });
}
