// The field's terms behind the plain words. They show on hover and on focus, and screen readers hear them.

import { h } from "./dom.js";

const TERMS = {
  nll: ["negative log-likelihood, NLL", "How unlikely the model finds the wanted answer: minus the natural logarithm of its probability, here per trained token. Lower is better; 0 would be certainty. Unit: nats."],
  change: ["change of the NLL", "Loss of the tuned model minus that of the base model. Below zero the answer became more likely, above zero less likely."],
  held_out: ["held-out data", "Examples that were not trained on. Only they can say whether something general was learnt."],
  interval: ["95% interval", "Percentile bootstrap over examples: where the value would lie in 95 of 100 draws of as many examples."],
  base: ["base model", "The model before this training."],
  tuned: ["tuned model", "The model after this training."],
  surprise: ["largest token NLL", "How unlikely the least likely trained token of the example is: minus the logarithm of its probability, in nats."],
  stop: ["stop token probability", "The chance that the answer ends where it should: the probability of the end-of-turn token, the least likely one if there are several."],
  trained: ["loss weight above 0", "These tokens count in the loss. All others are only context that the model reads."],
  logprob: ["log-probability", "Natural logarithm of the chance that the model gave this token after all tokens before it."],
  rank: ["rank", "The place of this token among all tokens that could have come, the likeliest first."],
  entropy: ["entropy of the distribution", "How undecided the model is before this token: 0 is certain of one token. In nats."],
  gradient: ["p − onehot", "The gradient of the loss on each token's score (its logit). A training step pushes the other way: minus is pushed up, plus is pushed down, and all together sum to zero."],
  predicted: ["first-order prediction", "Gradient of the log-probability times the change of the weights (Taylor). It holds for small steps."],
  measured: ["measured change", "Log-probability after one optimizer step on this example, minus the one before. The weights are put back afterwards."],
  learning_rate: ["learning rate", "How far the optimizer moves the weights in a step."],
  mask: ["loss mask", "Which tokens are trained. Bold text counts in the loss, grey text is only read."],
  length: ["tokens", "Pieces of text as the model reads them, about four letters of English each."],
};

/** Words with a term behind them, reachable by keyboard. */
export function term(key, words) {
  return explained(h("button", { type: "button", class: "term" }, words), key);
}

/** Give an element that can be focused the explanation of a term. */
export function explained(element, key) {
  element.dataset.term = key;
  element.setAttribute("aria-describedby", definition(key));
  return element;
}

function definition(key) {
  const id = `term-${key}`;
  if (!document.getElementById(id)) {
    const [name, meaning] = TERMS[key];
    document.body.append(h("p", { id, hidden: true }, `${name}: ${meaning}`));
  }
  return id;
}

/** Show the explanation of what is under the pointer or has the focus; Escape hides it. */
export function startTips() {
  const tip = document.getElementById("tip");
  let owner = null;
  const hide = () => {
    owner = null;
    tip.hidden = true;
  };
  const show = (event) => {
    const element = event.target.closest?.("[data-term]");
    if (!element) {
      if (event.type === "focusin" || !tip.contains(event.target)) hide();
      return;
    }
    if (element === owner) return;
    owner = element;
    const [name, meaning] = TERMS[element.dataset.term];
    tip.replaceChildren(h("strong", {}, name), h("span", {}, meaning));
    tip.hidden = false;
    const at = element.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left), innerWidth - tip.offsetWidth - 8);
    const below = at.bottom + 6 + tip.offsetHeight < innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below ? at.bottom + 6 : at.top - 6 - tip.offsetHeight}px`;
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("focusout", hide);
  addEventListener("scroll", hide, { passive: true });
  addEventListener("hashchange", hide);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}
