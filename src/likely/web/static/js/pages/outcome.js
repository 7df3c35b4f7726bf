// What a finished run came to: held-out figures before and after.

import { h } from "../dom.js";
import { count, harmless, interval, many, number, percent, signed } from "../format.js";
import { term } from "../glossary.js";
import { table } from "../parts.js";

const FIGURES = [
  ["Loss, nats per token", (e) => number(e.nll, 4)],
  ["95% interval", (e) => interval(e.ci95, (end) => number(end, 4))],
  ["Perplexity", (e) => number(e.perplexity, 3)],
  ["Bits per byte", (e) => number(e.bits_per_byte, 4)],
  ["Tokens that are the first choice", (e) => percent(e.token_accuracy)],
];

/** entries: one or two runs. Null where none has held-out figures. */
export function outcome(entries) {
  const known = entries.filter(({ report }) => report?.base && report?.tuned);
  if (!known.length) return null;
  const title = h("h2", {}, "On ", term("held_out", "answers it was not trained on"));
  return h("section", {}, title, known.map((entry) => figures(entry, entries.length > 1)));
}

function figures({ name, report }, named) {
  const { base, tuned, delta, exact_match: match } = report;
  const rows = FIGURES.map(([words, cell]) => ({ words, before: cell(base), after: cell(tuned) }));
  const matching = (equal) => `${count(equal)} of ${count(match.of)}`;
  if (match) rows.push({ words: "Generated answers equal to the wanted one", before: matching(match.base), after: matching(match.tuned) });
  return h(
    "div",
    {},
    named && h("h3", {}, harmless(name)),
    delta && cards(delta, tuned),
    table({
      caption: `${named ? `${harmless(name)}: ` : ""}${many(tuned.num_examples, "example")}, ${count(tuned.num_tokens)} trained tokens`,
      rows,
      columns: [
        { name: "", head: true, cell: (row) => row.words },
        { name: term("base", "Before"), number: true, cell: (row) => row.before },
        { name: term("tuned", "After"), number: true, cell: (row) => row.after },
      ],
    }),
  );
}

const cards = ({ nll, ci95, share_better: share }, tuned) =>
  h(
    "dl",
    { class: "cards" },
    card("Change of the loss", signed(nll, 4), nll < 0 ? "nats per token, better" : "nats per token, not better"),
    card(term("interval", "95% interval"), interval(ci95, (end) => signed(end, 3)), "of that change"),
    card("More likely now", percent(share), `of ${many(tuned.num_examples, "example")}`),
  );

const card = (words, value, more) =>
  h("div", { class: "card-figure" }, h("dt", {}, words), h("dd", {}, h("strong", {}, value), h("span", {}, more)));
