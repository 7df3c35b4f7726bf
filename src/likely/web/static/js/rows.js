// The table of scored rows: found, sorted and paged by the server, with the losses before and after as a picture.

import { get, link } from "./api.js";
import { announce, h } from "./dom.js";
import { figure } from "./figure.js";
import { count, harmless, many, number, percent, signed } from "./format.js";
import { explained, term } from "./glossary.js";
import { button, notice, scrollable, select, settle } from "./parts.js";
import { address, place, remember } from "./router.js";
import { scatter, scatterRows } from "./scatter.js";

const ROWS = 50; // of a page
const POINTS = 2000; // of the picture
const TYPING = 350; // milliseconds without a key before a text is looked for
const FILTERS = ["text", "role", "source", "worse", "stop_unlikely"];
const WAYS = { asc: "ascending", desc: "descending" };
const ARROWS = { asc: "▲", desc: "▼" };

export class RowsTable {
  constructor({ set, run, signal }) {
    Object.assign(this, { set, run, signal });
    const { query } = place();
    const first = set.has_base ? "change" : "nll_tuned";
    this.filters = Object.fromEntries(FILTERS.map((name) => [name, query.get(name)]));
    this.order = { sort: query.get("sort") ?? first, order: query.get("order") ?? "desc", cursor: query.get("cursor") };
    this.counted = h("p", { class: "counted" });
    this.list = h("div", { class: "list" });
    this.picture = h("div", { class: "beside-list" });
    this.element = h("div", {}, this.form(), this.counted, h("div", { class: set.has_base ? "split" : null }, this.list, this.picture));
  }

  /** Ask for the rows; and for the picture and the count, where the filters changed. */
  async refresh(filtered = true) {
    const { signal, filters } = this;
    const base = `/scores/${this.set.id}`;
    this.list.setAttribute("aria-busy", "true");
    const rows = get(`${base}/rows`, { query: { ...filters, ...this.order, limit: ROWS }, signal });
    const drawn = [settle(this.list, rows, (found) => this.table(found))];
    if (filtered) {
      const counted = get(`${base}/count`, { query: filters, signal });
      drawn.push(settle(this.counted, counted, (found) => this.told(found)));
      if (this.set.has_base) {
        const points = get(`${base}/scatter`, { query: { ...filters, limit: POINTS }, signal });
        drawn.push(settle(this.picture, points, (found) => this.scatter(found)));
      }
    }
    await Promise.all(drawn);
    this.list.removeAttribute("aria-busy");
  }

  filter(changes) {
    Object.assign(this.filters, changes);
    this.order.cursor = null;
    remember({ ...changes, cursor: null }, { push: true });
    return this.refresh();
  }

  turn(changes) {
    Object.assign(this.order, { cursor: null, ...changes });
    remember(this.order, { push: true });
    return this.refresh(false);
  }

  told({ rows, of }) {
    const words = rows === of ? `All ${many(of, "row")}` : `${count(rows)} of ${many(of, "row")}`;
    announce(words);
    return words;
  }

  form() {
    const { set } = this;
    let typing;
    const find = ({ target }) => {
      clearTimeout(typing);
      typing = setTimeout(() => this.signal.aborted || this.filter({ text: target.value || null }), TYPING);
    };
    const text = h("input", { type: "search", value: this.filters.text, maxlength: 200, oninput: find });
    const save = ({ currentTarget }) => currentTarget.setAttribute("href", this.csv());
    return h(
      "form",
      { class: "filters", role: "search", "aria-label": "Rows", onsubmit: (event) => event.preventDefault() },
      h("label", { class: "wide" }, "Text contains", text),
      set.roles?.length > 1 && this.choice("role", "Has tokens of", set.roles.map((role) => [role, role])),
      set.sources?.length > 1 && this.choice("source", "From", set.sources.map(({ id, name }) => [id, harmless(name)])),
      set.has_base && this.check("worse", "Got worse"),
      this.check("stop_unlikely", "Stop token unlikely"),
      h("a", { href: this.csv(), download: "", class: "button", onclick: save }, "Save as CSV"),
    );
  }

  choice(name, words, options) {
    const onChoose = (value) => this.filter({ [name]: value || null });
    return h("label", {}, words, select([["", "any"], ...options], { chosen: this.filters[name], onChoose }));
  }

  check(name, words) {
    const choose = ({ target }) => this.filter({ [name]: target.checked ? "1" : null });
    return h("label", { class: "check" }, h("input", { type: "checkbox", checked: this.filters[name] === "1", onchange: choose }), words);
  }

  csv() {
    const { sort, order } = this.order;
    return link(`/scores/${this.set.id}/rows.csv`, { ...this.filters, sort, order });
  }

  table({ rows, next, previous }) {
    if (!rows.length) return notice("No row is like that.");
    const columns = COLUMNS.filter(({ base }) => !base || this.set.has_base);
    const cell = (row, { head, kind, draw }) => h(head ? "th" : "td", { scope: head && "row", class: kind }, draw(row, this.link(row.id)));
    const cells = (row) => columns.map((column) => cell(row, column));
    const whole = h(
      "table",
      { class: "rows", onclick: (event) => this.clicked(event) },
      h("caption", { class: "unseen" }, "Scored rows. The buttons in the header sort them."),
      h("thead", {}, h("tr", {}, columns.map((column) => this.header(column)))),
      h("tbody", {}, rows.map((row) => h("tr", { "data-id": row.id }, cells(row)))),
    );
    const turn = (cursor) => this.turn({ cursor }).then(() => this.element.scrollIntoView({ block: "start" }));
    const step = (words, cursor) => button(words, () => turn(cursor), { disabled: !cursor });
    const pager = h("nav", { class: "pager", "aria-label": "Pages of rows" }, step("← Previous", previous), step("Next →", next));
    return [scrollable(whole, "Scored rows"), pager];
  }

  header({ name, sort, kind, explain, first = "desc" }) {
    if (!sort) return h("th", { scope: "col", class: kind }, name);
    const own = this.order.sort === sort;
    const order = own ? { asc: "desc", desc: "asc" }[this.order.order] : first;
    const press = () => this.turn({ sort, order }).then(() => this.list.querySelector(`[data-sort=${sort}]`)?.focus());
    const arrow = h("span", { "aria-hidden": "true", class: "arrow" }, own ? ARROWS[this.order.order] : "");
    const sorter = button([name, arrow], press, { class: "sort", "data-sort": sort });
    if (explain) explained(sorter, explain);
    return h("th", { scope: "col", class: kind, "aria-sort": own ? WAYS[this.order.order] : null }, sorter);
  }

  link(id) {
    return address(`/scores/${this.set.id}/${id}`, { run: this.run });
  }

  /** A click anywhere in a row opens it; its link does the same for the keyboard. */
  clicked(event) {
    const row = event.target.closest("tr[data-id]");
    if (row && !event.target.closest("a, button") && !String(getSelection())) location.hash = this.link(row.dataset.id);
  }

  scatter(points) {
    if (!points.id.length) return null;
    const sampled = points.of > points.id.length ? `An even sample of ${count(points.id.length)} of ${count(points.of)} rows. ` : "";
    return figure({
      name: `${this.set.name}-before-after`,
      title: "Before and after",
      picture: scatter(points, (id) => (location.hash = this.link(id))),
      rows: () => scatterRows(points),
      caption: [sampled, "Each mark is a row; below the line its ", term("nll", "loss"), " fell. A click opens it."],
    });
  }
}

function changeWords({ change }) {
  const [name, sign] = change > 0 ? ["worse-words", "▲"] : change < 0 ? ["better-words", "▼"] : [null, ""];
  return h("span", { class: name }, h("span", { "aria-hidden": "true" }, sign), ` ${signed(change)}`);
}

/** A row's last turn before what is trained, and the beginning of that; all of its text where no turns are told apart. */
function preview({ text }) {
  const [prompt, ...answer] = text.split(" … ");
  const turns = prompt.split(/<\|\w+\|>/).map((turn) => turn.trim()).filter((turn) => turn.includes("\n"));
  const asked = turns.at(-1)?.replace(/^(system|user|assistant|tool)\n/, "");
  const shown = asked && answer.length ? [asked, ...answer].join(" … ") : text;
  return h("span", { class: "clamp", dir: "auto" }, harmless(shown));
}

const rowLink = ({ source }, href) => h("a", { href }, harmless(source.split(/[\\/]/).at(-1)));

const COLUMNS = [
  { name: "Row", sort: "id", first: "asc", kind: "source", head: true, draw: rowLink },
  { name: "Text", kind: "preview", draw: preview },
  { name: "Before", sort: "nll_base", kind: "number", explain: "nll", base: true, draw: (row) => number(row.nll_base) },
  { name: "After", sort: "nll_tuned", kind: "number", explain: "nll", draw: (row) => number(row.nll_tuned) },
  { name: "Change", sort: "change", kind: "number", explain: "change", base: true, draw: changeWords },
  { name: "Tokens", sort: "length", kind: "number", explain: "length", draw: (row) => count(row.length) },
  { name: "Surprise", sort: "surprise", kind: "number", explain: "surprise", draw: (row) => number(row.surprise, 2) },
  { name: "Stops", sort: "stop", first: "asc", kind: "number", explain: "stop", draw: (row) => percent(row.stop) },
];
