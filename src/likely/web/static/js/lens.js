// A wanted answer under the base model and the tuned one, side by side; a token opens its card.

import { TokenCard } from "./card.js";
import { h } from "./dom.js";
import { count, number, percent, signed } from "./format.js";
import { term } from "./glossary.js";
import { LEGENDS } from "./shading.js";
import { legend, strip } from "./tokens.js";

export class LensView {
  /** found: what the server's jobs `lens` and `step` give: A is the base model, B the tuned one. */
  constructor({ found, signal }) {
    this.tokens = found.tokens;
    this.hasBase = this.tokens.some(({ A }) => A);
    this.card = new TokenCard({ signal, load: null, hint: "Choose a token to see who else could have come there." });
    const { A, B } = found.nll;
    const views = [this.hasBase && this.view("A", "base", "Before", A), this.view("B", "tuned", "After", B)].filter(Boolean);
    this.element = h(
      "section",
      {},
      h("h2", {}, "How likely the wanted answer is"),
      h("p", {}, verdict(A, B)),
      legend(LEGENDS.chance),
      h("div", { class: "split" }, h("div", { class: "columns" }, views), this.card.element),
    );
  }

  view(state, key, words, nll) {
    const chances = this.tokens.map(({ text, [state]: { nll: own, rank } }) => ({ text, rank, logprob: -own }));
    const line = strip({ label: `Wanted answer, ${words.toLowerCase()}`, chances, onMove: (i) => this.show(i) });
    line.classList.add("numbered");
    const sum = h("small", {}, ` ${number(nll)} nats in all, chance ${percent(Math.exp(-nll))}`);
    return h("div", {}, h("h3", {}, term(key, words), sum), line);
  }

  show(i) {
    const { A, B, text } = this.tokens[i];
    this.card.kept.set(i, { rows: rowsOf(text, A, B) });
    const { rank, entropy } = B;
    this.card.show({ i, of: this.tokens.length, text, weight: 1, before: A ? -A.nll : null, after: -B.nll, rank, entropy, askable: true });
  }
}

/** In words, from the losses of the whole answer in nats; a is undefined where there is no base model. */
function verdict(a, b) {
  if (a === undefined) return `The answer has the probability ${percent(Math.exp(-b))}.`;
  const better = b < a;
  const factor = Math.exp(Math.min(Math.abs(a - b), 700));
  const times = factor < 1e6 ? (factor < 10 ? number(factor, 2) : count(factor)) : factor.toExponential(1);
  return `After the training the answer is ${times} times ${better ? "as" : "less"} likely${better ? " as before" : " than before"}: ${signed(b - a)} nats of loss.`;
}

/** The rivals of both models in one list; what a model was not asked about is part of its "everything else". */
function rowsOf(text, A, B) {
  const rivals = (belief) => new Map(belief?.rivals ?? []);
  const [before, after] = [rivals(A), rivals(B)];
  const both = [...after.keys()].filter((name) => !A || before.has(name));
  const row = (name, p, q, gold = false) => {
    const push = (value) => (value === null ? null : value - (gold ? 1 : 0));
    return { text: name, gold, before: p, after: q, gradient_before: push(p), gradient_after: push(q) };
  };
  const gold = row(text, A ? A.probability : null, B.probability, true);
  const shown = [gold, ...both.map((name) => row(name, A ? before.get(name) : null, after.get(name)))];
  const rest = (column) => Math.max(0, 1 - shown.reduce((sum, own) => sum + own[column], 0));
  return [...shown, row("everything else", A ? rest("before") : null, rest("after"))];
}
