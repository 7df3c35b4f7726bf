// The training data before any training: what is trained of it, and what a careful reader would change first.

import { aborted, get, jobOf } from "../api.js";
import { fill, h } from "../dom.js";
import { figure } from "../figure.js";
import { count, harmless, many, percent } from "../format.js";
import { term } from "../glossary.js";
import { histogram, histogramRows } from "../histogram.js";
import { maskView } from "../mask.js";
import { button, facts, failure, notice, quiet, select, table, watch } from "../parts.js";
import { remember } from "../router.js";

const OFFER =
  "The check reads every row of the training data once, proves what is trained, and lists what a careful reader would " +
  "change first. It loads no model and changes nothing. A million rows take minutes.";

export async function dataPage({ view, parameters, query, signal }) {
  const run = await get(`/runs/${parameters.run}`, { signal });
  const page = new DataPage({ run, query, signal });
  fill(view, h("h1", {}, "Data"), page.element);
  await page.open();
  return "Data";
}

class DataPage {
  constructor({ run, query, signal }) {
    Object.assign(this, { run, query, signal });
    this.element = h("div", {});
  }

  /** Go on with a check that was asked for before; else offer one. */
  async open() {
    const job = await jobOf(this.run.id, "check", ["waiting", "running", "done"], this.signal);
    if (job || this.query.has("line")) this.check(job);
    else this.offer(null);
  }

  offer(error) {
    fill(this.element, error, notice(OFFER, button("Check the data", () => this.check(), { class: "main" })));
  }

  /** A check goes on when the page is left. */
  async check(job = { kind: "check", run: this.run.id }) {
    let found;
    try {
      found = await watch(this.element, "Checking the data", job, this.signal, { stays: true });
    } catch (error) {
      if (!this.signal.aborted) this.offer(aborted(error) ? null : failure(error));
      return;
    }
    this.draw(found);
  }

  draw(found) {
    this.files = found.data.files;
    this.mask = h("div", {});
    const asked = this.query.has("line");
    fill(
      this.element,
      h("p", { class: `verdict-words ${found.ok ? "" : "bad"}` }, harmless(found.verdict)),
      h("p", {}, button("Check again", () => this.check(), { class: "quiet" })),
      about(found.data),
      proof(found.proof),
      h("section", {}, h("h2", {}, "What is ", term("mask", "trained"), " of a row"), this.finder(), this.mask),
      lengths(found),
      this.audit(found.audit),
    );
    if (asked) this.show(Number(this.query.get("file") ?? 0), Number(this.query.get("line")), { scroll: false });
    else fill(this.mask, found.shown.map(maskView));
  }

  finder() {
    const files = select(this.files.map(({ path }, i) => [i, harmless(path)]), { chosen: this.query.get("file") ?? 0, onChoose: () => {} });
    const line = h("input", { type: "number", min: 1, value: this.query.get("line") ?? 1, required: true });
    Object.assign(this, { fileField: files, lineField: line });
    const submit = (event) => {
      event.preventDefault();
      this.show(Number(files.value), Number(line.value), { scroll: false });
    };
    return h(
      "form",
      { class: "controls", onsubmit: submit },
      this.files.length > 1 ? h("label", {}, "File ", files) : null,
      h("label", {}, "Row at line ", line),
      h("button", { type: "submit" }, "Show"),
    );
  }

  /** Any row, as it is trained on. */
  async show(file, line, { scroll = true } = {}) {
    remember({ file: file || null, line });
    [this.fileField.value, this.lineField.value] = [String(file), String(line)];
    if (scroll) this.mask.scrollIntoView({ block: "center" });
    try {
      const { shown } = await watch(this.mask, "Reading the row", { kind: "mask", run: this.run.id, file, line }, this.signal);
      fill(this.mask, shown.map(maskView));
    } catch (error) {
      if (!aborted(error)) fill(this.mask, failure(error));
    }
  }

  audit(tables) {
    const found = Object.entries(tables);
    const some = found.filter(([, own]) => own.count);
    const none = found.filter(([, own]) => !own.count).map(([kind]) => kind);
    return h(
      "section",
      {},
      h("h2", {}, "Worth a look"),
      some.length ? some.map(([kind, own]) => this.finding(kind, own)) : h("p", {}, "Nothing was found."),
      none.length > 0 && quiet(`Looked for and not found: ${none.join(", ")}.`),
    );
  }

  finding(kind, { count: number, advice, rows }) {
    const more = number > rows.length ? `, the first ${count(rows.length)} listed` : "";
    return h(
      "details",
      { class: "section" },
      h("summary", {}, h("h3", {}, `${count(number)} ${kind}`), h("span", { class: "quiet-text" }, `${advice}${more}`)),
      table({
        caption: kind,
        hideCaption: true,
        rows,
        columns: [
          { name: "Row", head: true, cell: ({ source }) => this.opener(source) },
          { name: "What was found", cell: ({ detail }) => harmless(detail) },
        ],
      }),
    );
  }

  /** A row that can be opened, if it is of a file of the training data. */
  opener(source) {
    const [, path, line] = /^(.*):(\d+)$/s.exec(source) ?? [];
    const file = this.files.findIndex((own) => own.path === path);
    if (file < 0) return harmless(source);
    return button(harmless(source), () => this.show(file, Number(line)), { class: "link" });
  }
}

const shapes = (file) => Object.entries(file.shapes).map(([shape, number]) => `${count(number)} of ${shape}`);

const about = (data) =>
  table({
    caption: `${many(data.rows, "row")}, ${many(data.examples, "example")} to train on`,
    rows: data.files,
    columns: [
      { name: "File", head: true, cell: ({ path }) => harmless(path) },
      { name: "Rows", number: true, cell: (file) => count(file.rows) },
      { name: "Refused", number: true, cell: (file) => count(file.refused) },
      { name: "Examples", number: true, cell: (file) => count(file.examples) },
      { name: "Shapes", cell: (file) => harmless(shapes(file).join(", ")) },
    ],
  });

function proof(found) {
  const lines = [
    ["Tokens trained", `${count(found.tokens.trained)} of ${count(found.tokens.all)}`],
    ["Answers whose end is trained too", `${percent(found.stop_share)} of ${count(found.assistant_turns)}`],
    ["Prompts equal to those of inference", count(found.prompts_equal_to_inference)],
    ["Rows refused", count(found.refused.rows)],
    ["Examples with nothing to train", count(found.nothing_to_train)],
    [`Examples over ${count(found.over_length.limit)} tokens`, count(found.over_length.examples)],
  ];
  const refused = Object.entries(found.refused.listed).map(([row, why]) => h("li", {}, harmless(`${row}: ${why}`)));
  return h(
    "section",
    {},
    h("h2", {}, "Proof, over all rows"),
    facts(lines, "facts wide"),
    refused.length > 0 && h("details", {}, h("summary", {}, "Refused rows"), h("ul", {}, refused)),
  );
}

const lengths = ({ lengths: found }) =>
  figure({
    name: "lengths",
    title: "Lengths",
    picture: histogram(found),
    rows: () => histogramRows(found),
    caption: "How many examples have how many tokens. What is right of the cut line is refused, cut or left out, as the settings say.",
  });
