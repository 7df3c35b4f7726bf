// One example, token by token: how likely each is before, after, and at every checkpoint between.

import { aborted, get } from "../api.js";
import { TokenCard } from "../card.js";
import { announce, fill, h } from "../dom.js";
import { saveCsv } from "../export.js";
import { harmless, many, number, percent, signed, spoken } from "../format.js";
import { term } from "../glossary.js";
import { button, facts, failure, quiet, switcher, watch } from "../parts.js";
import { address, remember } from "../router.js";
import { LEGENDS, ofChance, ofChange } from "../shading.js";
import { legend, TokenView } from "../tokens.js";

const RIVALS = 5;
const HINT = "Choose a token: click it, or move to the text and use the arrow keys. Enter asks the models what else could have come.";
const KEYS = "Arrow keys move, Home and End go to the ends of a line, n and p to the next and the previous trained token, Enter opens.";

export async function examplePage({ view, parameters, query, signal, run }) {
  const example = await get(`/scores/${parameters.set}/rows/${parameters.row}`, { signal });
  const page = new ExamplePage({ example, set: parameters.set, query, signal, run: example.run ?? run });
  fill(view, page.element);
  await page.open();
  return `Row ${example.source.split(/[\\/]/).at(-1)}`;
}

class ExamplePage {
  constructor({ example, set, query, signal, run }) {
    Object.assign(this, { example, set, signal, run, states: example.states.filter(({ id }) => id !== "base") });
    this.hasBase = example.base_logprob.some((value) => value !== null);
    this.columns = new Map([["tuned", { logprob: example.logprob, rank: example.rank, entropy: example.entropy }]]);
    this.state = this.states.some(({ id }) => id === query.get("state")) ? query.get("state") : "tuned";
    const shown = query.get("show");
    this.shown = this.hasBase && ["before", "after", "change"].includes(shown) ? shown : this.hasBase ? "change" : "after";
    this.numbered = query.get("numbers") === "1";
    this.first = Number(query.get("token") ?? 0) - 1;
    this.card = new TokenCard({ signal, hint: HINT, load: this.run && ((...asked) => this.loadCard(...asked)) });
    this.key = h("div", {});
    this.waiting = h("div", {});
    this.element = this.build();
  }

  build() {
    const { example } = this;
    const texts = example.token_text;
    this.view = new TokenView({
      tokens: { texts, weights: example.token_weight, roles: example.token_role.map((role) => example.roles[role] ?? null) },
      label: "Tokens of the example",
      describe: (i) => this.describe(i),
      onMove: (i) => this.moved(i),
      onOpen: () => this.card.open(),
    });
    this.view.element.classList.toggle("numbered", this.numbered);
    return h(
      "div",
      {},
      h("p", { class: "crumbs" }, h("a", { href: address(`/scores/${this.set}`, { run: this.run }) }, "← Examples")),
      h("h1", {}, harmless(example.source)),
      this.figures(),
      this.controls(),
      this.waiting,
      h("div", { class: "split" }, h("div", {}, this.key, this.view.element, quiet(KEYS)), this.card.element),
    );
  }

  async open() {
    this.paint();
    if (this.first >= 0) this.view.select(Math.min(this.first, this.view.spans.length - 1), { focus: false });
    if (this.state !== "tuned") await this.choose(this.state);
  }

  figures() {
    const { nll_base: before, nll_tuned: after, change, tokens, length, stop } = this.example;
    const way = change < 0 ? "more likely now" : change > 0 ? "less likely now" : "as likely as before";
    const parts = [
      [term("nll", "Loss"), before === null ? number(after) : `${number(before)} → ${number(after)}`],
      ["Change", change === null ? null : `${signed(change)} nats per token: ${way}`],
      [term("trained", "Trained"), `${number(tokens, Number.isInteger(tokens) ? 0 : 2)} of ${many(length, "token")}`],
      [term("stop", "Chance to stop"), stop === null ? null : percent(stop)],
    ];
    return facts(parts, "facts wide");
  }

  controls() {
    const options = [["before", "Before", !this.hasBase], ["after", "After", false], ["change", "Change", !this.hasBase]];
    const show = (value) => {
      this.shown = value;
      remember({ show: value });
      this.paint();
    };
    const showValues = ({ target }) => {
      this.numbered = target.checked;
      this.view.element.classList.toggle("numbered", this.numbered);
      remember({ numbers: this.numbered ? "1" : null });
    };
    return h(
      "div",
      { class: "controls" },
      switcher({ label: "Colour by", options, value: this.shown, onChange: show }),
      this.slider(),
      h("label", { class: "check" }, h("input", { type: "checkbox", checked: this.numbered, onchange: showValues }), "Show values"),
      button("Save as CSV", () => this.save(), { class: "quiet" }),
      !this.hasBase && quiet("These scores have no base model beside them."),
    );
  }

  /** The states of the run in their order, the tuned model last. */
  slider() {
    if (this.states.length < 2) return null;
    const at = Math.max(0, this.states.findIndex(({ id }) => id === this.state));
    const name = h("output", {}, this.states[at].name);
    const input = h("input", { type: "range", min: 0, max: this.states.length - 1, value: at, "aria-valuetext": this.states[at].name });
    let resting;
    input.addEventListener("input", () => {
      const { id, name: words } = this.states[Number(input.value)];
      name.textContent = words;
      input.setAttribute("aria-valuetext", words);
      clearTimeout(resting);
      resting = setTimeout(() => this.choose(id), this.columns.has(id) ? 0 : 250);
    });
    return h("label", { class: "slider" }, "Checkpoint", input, name);
  }

  /** Show another state of the run; what is not scored yet is asked for. */
  async choose(state) {
    this.state = state;
    remember({ state: state === "tuned" ? null : state });
    this.asking?.abort();
    const asking = new AbortController();
    this.asking = asking;
    fill(this.waiting);
    try {
      const request = { kind: "example", set: this.set, row: this.example.id, state };
      const signal = AbortSignal.any([asking.signal, this.signal]);
      if (!this.columns.has(state)) this.columns.set(state, await watch(this.waiting, "Scoring this example", request, signal));
    } catch (error) {
      if (!aborted(error)) fill(this.waiting, failure(error));
      return;
    }
    if (this.asking !== asking) return;
    this.paint();
    announce(`After: ${this.states.find(({ id }) => id === state)?.name}`);
    if (this.view.at >= 0) this.moved(this.view.at);
  }

  get after() {
    return this.columns.get(this.state) ?? this.columns.get("tuned");
  }

  shade(i) {
    const before = this.example.base_logprob[i];
    const after = this.after.logprob[i];
    if (this.shown === "change") return ofChange(before, after);
    return ofChance(this.shown === "before" ? before : after);
  }

  paint() {
    this.view.paint((i) => this.shade(i));
    fill(this.key, legend([...LEGENDS[this.shown === "change" ? "change" : "chance"], ["untrained", "not trained, only read"]]));
  }

  token(i) {
    const { example, after } = this;
    return {
      i,
      of: example.token_text.length,
      text: example.token_text[i],
      id: example.token_id[i],
      role: example.roles[example.token_role[i]],
      weight: example.token_weight[i],
      before: example.base_logprob[i],
      after: after.logprob[i],
      rank: after.rank[i],
      entropy: after.entropy[i],
      askable: after === this.columns.get("tuned"),
    };
  }

  describe(i) {
    const { text, weight, before, after } = this.token(i);
    if (after === null) return `${spoken(text)}, nothing predicts it`;
    const moved = before === null ? "" : `, before ${percent(Math.exp(before))}, ${ofChange(before, after).words}`;
    return `${spoken(text)}, ${weight ? "trained" : "not trained"}, ${ofChance(after).words}${moved}`;
  }

  moved(i) {
    // Browsers slow down whoever writes the address at every key.
    clearTimeout(this.noting);
    this.noting = setTimeout(() => this.signal.aborted || remember({ token: i + 1 }), 200);
    this.card.show(this.token(i));
  }

  loadCard(position, holder, signal) {
    const request = { kind: "token", set: this.set, row: this.example.id, position, rivals: RIVALS };
    return watch(holder, "Asking the models", request, signal);
  }

  save() {
    const header = ["position", "id", "text", "role", "weight", "base_logprob", "logprob", "rank", "entropy"];
    const rows = this.example.token_text.map((_, i) => {
      const { id, text, role, weight, before, after, rank, entropy } = this.token(i);
      return [i + 1, id, text, role, weight, before, after, rank, entropy];
    });
    saveCsv(`example-${this.example.id}`, [header, ...rows]);
  }
}
