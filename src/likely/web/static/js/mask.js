// A row as it is trained on: bold text counts in the loss, grey text is only read.

import { h } from "./dom.js";
import { count, harmless, number } from "./format.js";

/** example: {source, tokens, pieces: [{text, tokens, weight, role}]}. */
export function maskView({ source, tokens, pieces }) {
  const trained = pieces.filter(({ weight }) => weight).reduce((sum, own) => sum + own.tokens, 0);
  return h(
    "figure",
    { class: "mask" },
    h("figcaption", {}, h("strong", {}, harmless(source)), `: ${count(trained)} of ${count(tokens)} tokens are trained`),
    h("div", { class: "mask-text", dir: "auto" }, pieces.map(draw)),
  );
}

/** The trained text stands between brackets that screen readers and copies of the text keep. */
function draw({ text, weight }) {
  if (!weight) return h("span", { class: "read-only" }, harmless(text));
  const times = weight === 1 ? null : h("sup", {}, `×${number(weight, 2)}`);
  return h("mark", {}, "⟦", harmless(text), times, "⟧");
}
