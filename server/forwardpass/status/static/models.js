// A card for each model version: figures, layers, contract, batching verdict, and the form to try it. Cards are made
// once and then updated in place, so that focus, open parts and what was typed stay.

import { spark } from "./charts.js";
import { NONE, make, number, seconds, shape, tiny, write } from "./format.js";
import { TryForm } from "./try.js";

const OPEN_UP_TO = 3; // models whose details are open from the start

const STATES = {
  ready: "ready",
  stale: "ready, not reloaded",
  loading: "loading",
  unloading: "unloading",
  failed: "failed",
  not_loaded: "not loaded",
};

const VERDICTS = {
  exact: "A row's answer is the same alone and in any batch, bit for bit.",
  rounding: "A row's answer is the same alone and in a batch, up to rounding.",
  dependent: "A row's answer depends on the other rows of a batch: one request at a time.",
  asserted: "The options assert that rows do not influence each other.",
  none: "Axis 0 is no batch: one request at a time.",
};

const FIGURES = [
  ["rate", "requests/s"],
  ["p50", "p50"],
  ["p99", "p99"],
  ["rows", "rows a batch"],
  ["waiting", "waiting"],
  ["answered", "answered"],
];

class Card {
  constructor(model, open, context) {
    this.context = context;
    this.identity = "";
    const id = `model-${model.name}-${model.version}`;
    this.state = make("span", { className: "pill" });
    this.spark = make("div", { className: "spark" });
    this.figures = Object.fromEntries(FIGURES.map(([name]) => [name, make("dd")]));
    this.reason = make("p", { className: "reason", hidden: true });
    this.facts = make("dl", { className: "about" });
    this.drawing = make("figure", { className: "drawing", tabIndex: 0, role: "region", "aria-label": `Layers of ${model.name}` });
    this.form = new TryForm(model, context);
    this.details = make("details", { open }, make("summary", {}, "Layers, contract and batching"), make("div", { className: "inside" }, this.facts, this.drawing));
    this.attempt = make("details", { className: "try" }, make("summary", {}, "Try it"), this.form.element);
    this.details.addEventListener("toggle", () => this.draw());
    this.attempt.addEventListener("toggle", () => this.attempt.open && this.form.begin());
    this.element = make(
      "article",
      { className: "card", "aria-labelledby": id },
      make(
        "header",
        {},
        make("h3", { id }, model.name, ...(model.version ? [" ", make("span", { className: "version" }, `version ${model.version}`)] : [])),
        this.state,
        this.spark,
      ),
      this.reason,
      make("dl", { className: "figures" }, ...FIGURES.map(([name, title]) => make("div", {}, make("dt", {}, title), this.figures[name]))),
      this.details,
      this.attempt,
    );
  }

  update(model, infer) {
    this.model = model;
    const word = STATES[model.state] ?? model.state;
    write(this.state, word);
    this.state.dataset.state = model.state;
    this.element.dataset.state = model.state;
    this.reason.hidden = !model.reason;
    write(this.reason, model.reason);
    const served = Boolean(model.batching);
    const traffic = model.traffic;
    const total = traffic?.stages.total;
    write(this.figures.rate, number(traffic?.requests_per_second));
    write(this.figures.p50, seconds(total?.p50));
    write(this.figures.p99, seconds(total?.p99));
    write(this.figures.rows, number(traffic?.rows_per_batch));
    write(this.figures.waiting, served ? number(model.queue.requests) : NONE);
    write(this.figures.answered, served ? number(model.answered) : NONE);
    this.details.hidden = this.attempt.hidden = !served;
    if (!served) {
      this.spark.replaceChildren();
      this.identity = "";
      return;
    }
    spark(this.spark, model.chart, `requests a second of ${model.name} in the last minute, now ${number(traffic?.requests_per_second)}`);
    this.form.update(model, infer);
    const identity = JSON.stringify([model.batching, model.contract, model.inputs, model.outputs, model.loaded_seconds]);
    if (identity !== this.identity) {
      this.identity = identity; // loaded, or loaded again
      this.describe(model);
      this.drawn = false;
      this.form.forget();
      this.draw();
    }
  }

  describe(model) {
    const { batching, contract } = model;
    const tensor = (one) => make("span", { className: "tensor" }, make("code", {}, one.name), ` ${one.datatype} ${shape(one.shape)}`);
    const rows = [
      ["batching", make("span", { className: "badge", "data-verdict": batching.verdict }, batching.verdict), ` ${batching.batches ? `Batches of up to ${batching.most_rows} rows. ` : ""}${VERDICTS[batching.verdict] ?? ""}`, make("span", { className: "soft why" }, batching.why)],
      ["contract", contract ? `${contract.rows} sample rows hold, within ${tiny(contract.atol)} + ${tiny(contract.rtol)} · |expected|${contract.precision === "fp16" ? ", layers in fp16" : ""}.` : "None: exported elsewhere, and served as it is."],
      ["runs on", `${model.provider}, ${model.instances} × ${model.threads} ${model.threads === 1 ? "thread" : "threads"}; loaded in ${seconds(model.loaded_seconds)}`],
      ["inputs", ...model.inputs.map(tensor)],
      ["outputs", ...model.outputs.map(tensor)],
    ];
    this.facts.replaceChildren(...rows.map(([title, ...content]) => make("div", {}, make("dt", {}, title), make("dd", {}, ...content))));
  }

  // The drawing is fetched when it is first looked at.
  async draw() {
    if (this.drawn || !this.details.open || !this.model?.batching) return;
    this.drawn = true;
    const { name, version } = this.model;
    const response = await this.context.get(`/status/models/${encodeURIComponent(name)}/${encodeURIComponent(version)}/graph.svg`);
    if (response?.ok) {
      const url = URL.createObjectURL(await response.blob());
      const image = make("img", { src: url, alt: `The layers of ${name}: ${this.model.inputs.map((t) => `${t.name} ${shape(t.shape)}`).join(", ")} to ${this.model.outputs.map((t) => `${t.name} ${shape(t.shape)}`).join(", ")}` });
      image.addEventListener("load", () => URL.revokeObjectURL(url));
      this.drawing.replaceChildren(image);
    } else {
      const why = response ? (await response.json()).error : "the server does not answer";
      this.drawing.replaceChildren(make("figcaption", { className: "soft" }, `No drawing: ${why}`));
      this.drawn = Boolean(response);
    }
  }
}

export class Models {
  constructor(host, count, skipped, context) {
    Object.assign(this, { host, count, skipped, context });
    this.cards = new Map();
  }

  update(snapshot) {
    const models = snapshot.models;
    const serving = models.filter((model) => model.batching).length;
    write(this.count, `${serving} of ${models.length} ${models.length === 1 ? "serves" : "serve"}`);
    const seen = new Set();
    models.forEach((model, place) => {
      const key = `${model.name}/${model.version}`;
      seen.add(key);
      let card = this.cards.get(key);
      if (!card) {
        card = new Card(model, serving <= OPEN_UP_TO, this.context);
        this.cards.set(key, card);
      } else if (card.model.state !== model.state) {
        this.context.say(`${model.name} is ${STATES[model.state] ?? model.state}`);
      }
      if (this.host.children[place] !== card.element) this.host.insertBefore(card.element, this.host.children[place] ?? null);
      card.update(model, snapshot.server.infer);
    });
    for (const [key, card] of this.cards) {
      if (!seen.has(key)) {
        card.element.remove();
        this.cards.delete(key);
      }
    }
    this.skipped.hidden = !snapshot.skipped.length;
    const told = snapshot.skipped.map((one) => `${one.folder} is skipped: ${one.reason}`);
    if (told.join("\n") !== this.told) {
      this.told = told.join("\n");
      this.skipped.replaceChildren(...told.map((text) => make("li", {}, text)));
    }
  }
}
