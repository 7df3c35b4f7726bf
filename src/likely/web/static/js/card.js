// One token: its chances before and after, who else could have come, and where a training step pushes.

import { aborted } from "./api.js";
import { barRows, bars } from "./bars.js";
import { fill, h } from "./dom.js";
import { figure } from "./figure.js";
import { count, number, percent, signed, visible } from "./format.js";
import { term } from "./glossary.js";
import { button, facts, failure, quiet } from "./parts.js";

export class TokenCard {
  /** load: (i, holder, signal) => a promise of the server's card of a token; null where no model can be asked. */
  constructor({ load, signal, hint }) {
    Object.assign(this, { load, page: signal, hint, kept: new Map(), loading: null });
    this.picture = h("div", {});
    this.more = h("div", {});
    this.element = h("section", { class: "card", "aria-label": "The chosen token" }, quiet(hint));
  }

  /** token: {i, of, text, id, role, weight, before, after, rank, entropy}, null as unknown; log-probabilities in nats.
   * askable: whether they are those of the model that is asked. */
  show(token) {
    this.loading?.abort();
    this.token = token;
    const card = token.askable ? this.kept.get(token.i) : null;
    const place = h("small", {}, `token ${count(token.i + 1)} of ${count(token.of)}`);
    const title = h("h2", { class: "card-title" }, h("code", {}, visible(token.text)), place);
    fill(this.element, title, facts(known(token)), this.picture, this.more);
    fill(this.picture, this.draw(card?.rows ?? guess(token)));
    const ask = this.load && !card && token.i > 0 && button("Which other tokens could have come?", () => this.open());
    fill(this.more, token.askable ? ask : quiet("Other tokens can be asked for at the tuned model."));
  }

  /** Ask a model for the rivals. */
  async open() {
    const { token, kept } = this;
    if (!this.load || !token?.askable || token.i === 0 || kept.has(token.i)) return;
    this.loading?.abort();
    this.loading = new AbortController();
    try {
      kept.set(token.i, await this.load(token.i, this.more, AbortSignal.any([this.page, this.loading.signal])));
    } catch (error) {
      if (this.token === token && !aborted(error)) return void fill(this.more, failure(error));
    }
    if (this.token === token && !this.page.aborted) this.show(token);
  }

  draw(rows) {
    if (!rows) return null;
    return figure({
      name: `token-${this.token.i + 1}`,
      picture: bars(rows),
      rows: () => barRows(rows),
      caption: ["On the right, the ", term("gradient", "push"), " of a training step: it raises what is minus and lowers what is plus."],
    });
  }
}

/** What the scores alone say: the wanted token, and all others together. */
function guess({ text, before, after }) {
  if (after === null) return null;
  const [own, old] = [Math.exp(after), before === null ? null : Math.exp(before)];
  const rest = { text: "everything else", gold: false, before: old === null ? null : 1 - old, after: 1 - own, gradient_after: 1 - own };
  return [{ text, gold: true, before: old, after: own, gradient_after: own - 1 }, rest];
}

function known({ id, role, weight, before, after, rank, entropy }) {
  return [
    ["Chance", before === null ? percent(chance(after)) : `${percent(chance(before))} → ${percent(chance(after))}`],
    [term("logprob", "Log-probability"), before === null ? number(after) : `${number(before)} → ${number(after)}`],
    ["Change", before === null || after === null ? null : `${signed(after - before)} nats`],
    [term("rank", "Rank"), rank === null ? null : count(rank)],
    [term("entropy", "Uncertainty"), entropy === null ? null : `${number(entropy)} nats`],
    [term("trained", "Trained"), weight === 0 ? "no, only read" : weight === 1 ? "yes" : `yes, with weight ${number(weight, 2)}`],
    ["Of", role],
    ["Id", id === undefined ? null : String(id)],
  ];
}

const chance = (logprob) => (logprob === null ? null : Math.exp(logprob));
