// A text as its tokens, one of which is current: a list box with a roving tab stop, so that arrow keys move in it.

import { h } from "./dom.js";
import { spoken, visible } from "./format.js";
import { ofChance } from "./shading.js";

const SHORTEST_BLOCK = 200; // tokens; a block ends at the first line break after so many ...
const LONGEST_BLOCK = 600; // ... or here at the latest: blocks out of sight are not laid out

export class TokenView {
  /**
   * tokens: {texts, weights, roles}, columns of equal length; roles are names, or null where there are none.
   * describe: (i) => what is spoken of a token. onMove(i): another token is current. onOpen(i): it was clicked, or Enter.
   */
  constructor({ tokens, label, describe, onMove = () => {}, onOpen = () => {} }) {
    Object.assign(this, { tokens, describe, onMove, onOpen });
    this.at = -1;
    this.spans = tokens.texts.map(() => null);
    this.places = new WeakMap();
    this.element = h("div", { class: "tokens", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
    this.element.append(this.build());
    this.element.addEventListener("keydown", (event) => this.pressed(event));
    this.element.addEventListener("click", (event) => this.clicked(event));
    if (this.spans.length) this.spans[0].tabIndex = 0;
  }

  build() {
    const { texts, roles } = this.tokens;
    const whole = document.createDocumentFragment();
    for (let start = 0; start < texts.length; ) {
      let end = start + 1;
      while (end < texts.length && roles && roles[end] === roles[start]) end += 1;
      if (!roles) end = texts.length;
      const role = roles?.[start];
      const turn = h("div", { class: "turn", role: role && "group", "aria-label": role });
      if (role) turn.append(h("div", { class: "turn-role", "aria-hidden": "true" }, role));
      this.fillTurn(turn, start, end);
      whole.append(turn);
      start = end;
    }
    return whole;
  }

  fillTurn(turn, start, end) {
    let block = null;
    let size = 0;
    for (let i = start; i < end; i += 1) {
      if (!block) {
        block = document.createElement("div");
        block.className = "block";
        turn.append(block);
        size = 0;
      }
      block.append(this.span(i));
      size += 1;
      const breaks = this.tokens.texts[i].includes("\n");
      if (size >= LONGEST_BLOCK || (breaks && size >= SHORTEST_BLOCK)) block = null;
      else if (breaks) block.append(document.createElement("br"));
    }
  }

  span(i) {
    const span = document.createElement("span");
    span.setAttribute("role", "option");
    span.className = this.tokens.weights[i] ? "token" : "token untrained";
    span.textContent = visible(this.tokens.texts[i]);
    this.spans[i] = span;
    this.places.set(span, i);
    return span;
  }

  /** Shade every trained token by `shade(i)`, which has a name and a text, or is null. */
  paint(shade) {
    const { weights } = this.tokens;
    this.spans.forEach((span, i) => {
      const own = weights[i] ? shade(i) : null;
      const name = own ? `token ${own.name}` : weights[i] ? "token" : "token untrained";
      if (span.className !== name) span.className = name;
      if (own) span.dataset.value = own.text;
      else if (span.dataset.value !== undefined) delete span.dataset.value;
    });
    if (this.at >= 0) this.spans[this.at].setAttribute("aria-label", this.describe(this.at));
  }

  /** Make a token the current one. */
  select(i, { focus = true } = {}) {
    const old = this.spans[this.at] ?? this.spans[0];
    const span = this.spans[i];
    if (!span) return;
    old.removeAttribute("tabindex");
    old.removeAttribute("aria-selected");
    old.removeAttribute("aria-label");
    span.tabIndex = 0;
    span.setAttribute("aria-selected", "true");
    span.setAttribute("aria-label", this.describe(i));
    const moved = i !== this.at;
    this.at = i;
    if (focus) span.focus();
    if (moved) this.onMove(i);
  }

  clicked(event) {
    const i = this.places.get(event.target.closest(".token"));
    if (i === undefined) return;
    this.select(i);
    this.onOpen(i);
  }

  pressed(event) {
    const at = Math.max(this.at, 0);
    const last = this.spans.length - 1;
    const far = event.ctrlKey || event.metaKey;
    const moves = {
      ArrowRight: () => at + 1,
      ArrowLeft: () => at - 1,
      ArrowDown: () => this.inLine(at, 1),
      ArrowUp: () => this.inLine(at, -1),
      Home: () => (far ? 0 : this.endOfLine(at, -1)),
      End: () => (far ? last : this.endOfLine(at, 1)),
      n: () => this.trained(at, 1),
      p: () => this.trained(at, -1),
    };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.select(at);
      this.onOpen(at);
    } else if (moves[event.key] && !event.altKey && !(far && event.key.length === 1)) {
      event.preventDefault();
      this.select(Math.min(Math.max(moves[event.key](), 0), last));
    }
  }

  /** The next trained token in a direction. */
  trained(at, way) {
    for (let i = at + way; this.spans[i]; i += way) if (this.tokens.weights[i]) return i;
    return at;
  }

  /** The token of the next line that stands nearest to this one. */
  inLine(at, way) {
    const own = this.spans[at].getBoundingClientRect();
    const middle = own.left + own.width / 2;
    let best = at;
    let line = null;
    for (let i = at + way; this.spans[i]; i += way) {
      const other = this.spans[i].getBoundingClientRect();
      const beyond = way > 0 ? other.top >= own.bottom - 2 : other.bottom <= own.top + 2;
      if (!beyond) continue;
      if (line !== null && Math.abs(other.top - line.top) > other.height / 2) break;
      const gap = Math.abs(other.left + other.width / 2 - middle);
      if (line === null || gap < line.gap) {
        line = { top: line?.top ?? other.top, gap };
        best = i;
      }
    }
    return best;
  }

  endOfLine(at, way) {
    const { top } = this.spans[at].getBoundingClientRect();
    let i = at;
    while (this.spans[i + way] && Math.abs(this.spans[i + way].getBoundingClientRect().top - top) < 4) i += way;
    return i;
  }
}

/** A line of tokens that are all shaded by how likely each is. chances: [{text, logprob, rank}]. */
export function strip({ label, chances, onMove }) {
  const texts = chances.map(({ text }) => text);
  const shade = (i) => ofChance(chances[i].logprob);
  const describe = (i) => `${spoken(texts[i])}, ${shade(i).words}, rank ${chances[i].rank}`;
  const view = new TokenView({ tokens: { texts, weights: texts.map(() => 1), roles: null }, label, describe, onMove });
  view.paint(shade);
  return view.element;
}

/** What the shades mean, each as a token of its own. */
export const legend = (entries) =>
  h(
    "ul",
    { class: "legend", "aria-label": "Legend" },
    entries.map(([name, words]) => h("li", {}, h("span", { class: `token ${name}`, "aria-hidden": "true" }, "abc"), ` ${words}`)),
  );
