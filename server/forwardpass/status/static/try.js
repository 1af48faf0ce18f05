// The form that sends one row to a model, beginning with the contract's samples, and shows what came back.

import { picture } from "./charts.js";
import { make, number, seconds, tiny, write } from "./format.js";

const SHOWN = 5; // bars of an output
const LISTED = 24; // numbers of an output that has no bars
const NO_PORT = "This port has figures only. Requests go to the HTTP port, where there is one, or by gRPC: forwardpass predict.";

let forms = 0;

export class TryForm {
  constructor(model, context) {
    this.context = context;
    this.model = model;
    this.row = 0;
    this.sample = null;
    const id = `request-${++forms}`;
    this.place = make("span", { className: "place" });
    this.back = make("button", { type: "button", ariaLabel: "the row before" }, "←");
    this.next = make("button", { type: "button", ariaLabel: "the next row" }, "→");
    this.picture = make("div");
    this.text = make("textarea", { id, rows: 7, spellcheck: false });
    this.send = make("button", { type: "submit", className: "main" }, "Run");
    this.why = make("p", { className: "soft", hidden: true });
    this.result = make("div", { className: "result", role: "status" });
    this.element = make(
      "form",
      { className: "attempt" },
      make(
        "div",
        { className: "given" },
        this.picture,
        make("div", { className: "rows" }, make("p", {}, this.back, this.place, this.next), make("p", {}, this.send), this.why),
        make("label", { htmlFor: id }, "Request"),
        this.text,
      ),
      this.result,
    );
    this.back.addEventListener("click", () => this.load(this.row - 1));
    this.next.addEventListener("click", () => this.load(this.row + 1));
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.text.addEventListener("input", () => this.draw());
  }

  update(model, infer) {
    this.model = model;
    this.infer = infer;
    this.send.disabled = !infer;
    this.why.hidden = infer;
    write(this.why, infer ? "" : NO_PORT);
  }

  // The model was loaded again: its samples may be others.
  forget() {
    const wasThere = this.sample !== null;
    this.sample = null;
    if (wasThere) this.begin();
  }

  begin() {
    if (this.sample === null) this.load(0);
  }

  async load(row) {
    const rows = this.sample?.rows ?? 0;
    this.row = rows ? (row + rows) % rows : Math.max(0, row);
    const { name, version } = this.model;
    const response = await this.context.get(`/status/models/${encodeURIComponent(name)}/${encodeURIComponent(version)}/sample.json?row=${this.row}`);
    if (!response?.ok) {
      this.tell("The sample could not be had; the server may have stopped, or the model was unloaded.");
      return;
    }
    this.sample = await response.json();
    write(this.place, this.sample.source === "contract" ? `sample ${this.sample.row + 1} of ${this.sample.rows} in the contract` : "made-up values: there is no contract");
    this.back.hidden = this.next.hidden = this.sample.source === "contract" && this.sample.rows < 2;
    this.text.value = this.sample.inputs ? written(this.sample.inputs) : "";
    this.text.placeholder = this.sample.inputs ? "" : "A row of this model is too large for a form.";
    this.asGiven = this.text.value;
    this.result.replaceChildren();
    this.draw();
  }

  draw() {
    let found = null;
    try {
      const inputs = JSON.parse(this.text.value).inputs;
      found = inputs.length === 1 ? picture(inputs[0].data.flat(Infinity)) : null;
    } catch {
      // not JSON yet: it is being typed
    }
    this.picture.replaceChildren(...(found ? [found] : []));
  }

  tell(text) {
    this.result.replaceChildren(make("p", { className: "warning" }, text));
  }

  async run() {
    if (!this.infer) return;
    let request;
    try {
      request = JSON.parse(this.text.value);
    } catch (error) {
      this.tell(`The request is not JSON: ${error.message}`);
      return;
    }
    const { name, version } = this.model;
    const began = performance.now();
    const response = await this.context.get(`/v2/models/${encodeURIComponent(name)}/versions/${encodeURIComponent(version)}/infer`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
    });
    if (!response) {
      this.tell("The server does not answer.");
      return;
    }
    const took = (performance.now() - began) / 1e3;
    let answer;
    try {
      answer = await response.json();
    } catch {
      answer = {};
    }
    if (!response.ok) {
      this.tell(`${response.status}: ${answer.error ?? response.statusText}`);
      return;
    }
    const parts = (answer.outputs ?? []).map((output) => this.shown(output));
    const told = [`Answered in ${seconds(took)}, as this browser sees it.`];
    if (this.text.value === this.asGiven && this.sample.expected) told.push(this.held(answer.outputs ?? []));
    this.result.replaceChildren(...parts, make("p", { className: "soft" }, told.join(" ")));
  }

  shown(output) {
    const spec = this.model.outputs.find((one) => one.name === output.name);
    const values = (output.data ?? []).flat(Infinity);
    const width = output.shape?.at(-1) ?? values.length;
    const title = make("h4", {}, make("code", {}, output.name), ` ${output.datatype} [${output.shape}]`);
    const numbers = values.slice(0, width).map(Number);
    if (output.datatype === "BYTES" || width < 2 || numbers.some(Number.isNaN)) {
      const listed = values.slice(0, LISTED).map((value) => (typeof value === "number" ? number(value) : String(value)));
      return make("section", {}, title, make("p", { className: "values" }, listed.join(", ") + (values.length > LISTED ? ", …" : "")));
    }
    const sum = numbers.reduce((a, b) => a + b, 0);
    const shares = numbers.every((value) => value >= 0) && Math.abs(sum - 1) < 1e-2;
    const low = shares ? 0 : Math.min(...numbers);
    const reach = (shares ? 1 : Math.max(...numbers)) - low || 1;
    const order = numbers.map((_, place) => place).sort((a, b) => numbers[b] - numbers[a]).slice(0, SHOWN);
    const list = make("ol", { className: "bars" });
    for (const place of order) {
      const bar = make("span", { className: "bar", ariaHidden: "true" });
      bar.style.setProperty("--share", Math.max(0, (numbers[place] - low) / reach));
      const told = shares ? `${number(numbers[place] * 100)} %` : number(numbers[place]);
      list.append(make("li", {}, make("span", { className: "label" }, spec?.labels[place] ?? `[${place}]`), make("span", { className: "track" }, bar), make("span", { className: "value" }, told)));
    }
    return make("section", {}, title, list);
  }

  // Whether the answer is what the contract expects for this sample.
  held(outputs) {
    let largest = 0;
    for (const [name, expected] of Object.entries(this.sample.expected)) {
      const got = (outputs.find((one) => one.name === name)?.data ?? []).flat(Infinity);
      const wanted = [expected].flat(Infinity);
      const contract = this.model.contract;
      for (let place = 0; place < wanted.length; place += 1) {
        if (typeof wanted[place] !== "number") {
          if (String(got[place]) !== String(wanted[place])) return `NOT what the contract expects: ${name} differs.`;
          continue;
        }
        const apart = Math.abs(Number(got[place]) - wanted[place]);
        if (!(apart <= contract.atol + contract.rtol * Math.abs(wanted[place]))) return `NOT what the contract expects: ${name} is off by ${tiny(apart)}.`;
        largest = Math.max(largest, apart);
      }
    }
    return `As the contract expects, largest difference ${tiny(largest)}.`;
  }
}

// One line an input, so that a long row does not push the rest away.
function written(inputs) {
  const lines = inputs.map((input) => `    ${JSON.stringify(input)}`);
  return `{\n  "inputs": [\n${lines.join(",\n")}\n  ]\n}`;
}
