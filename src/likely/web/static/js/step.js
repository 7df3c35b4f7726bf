// What one training step on an answer does to it: the change that the gradient predicts beside the one that was measured.

import { h, label, svg } from "./dom.js";
import { figure } from "./figure.js";
import { number, shortened, signed, visible } from "./format.js";
import { term } from "./glossary.js";
import { table } from "./parts.js";

const WIDTH = 640;
const ROW = 34;
const NAMES = 150;
const HEADER = ["token", "logprob", "predicted", "measured"];
const MOST = 40; // tokens that are drawn; the table and the file have all

export class StepView {
  /** found: the server's job `step`: tokens with `{step: {before, predicted, measured}}`, log-probabilities in nats. */
  constructor({ found, rate }) {
    const tokens = found.tokens.filter(({ step }) => step);
    const sum = (name) => tokens.reduce((total, { step }) => total + step[name], 0);
    const [predicted, measured] = [signed(sum("predicted"), 4), signed(sum("measured"), 4)];
    const change = `should change the log-probability of the answer by ${predicted} nats, and changed it by ${measured}`;
    const columns = [
      { name: "Token", head: true, cell: ({ text }) => h("code", {}, visible(text)) },
      { name: "Before", number: true, cell: ({ step }) => number(step.before, 4) },
      { name: term("predicted", "Predicted"), number: true, cell: ({ step }) => signed(step.predicted, 5) },
      { name: term("measured", "Measured"), number: true, cell: ({ step }) => signed(step.measured, 5) },
    ];
    const picture = figure({
      name: "one-step",
      title: "One step on this",
      picture: drawn(tokens.slice(0, MOST)),
      rows: () => [HEADER, ...tokens.map(({ text, step }) => [text, step.before, step.predicted, step.measured])],
      caption: `One step at learning rate ${rate} ${change}. The model is put back afterwards: nothing is kept of the step.`,
      table: table({ caption: "Log-probability of each token and its change, in nats", rows: tokens, columns }),
    });
    this.element = h("section", {}, picture);
  }
}

function drawn(tokens) {
  const height = tokens.length * ROW + 40;
  const most = Math.max(...tokens.flatMap(({ step }) => [Math.abs(step.predicted), Math.abs(step.measured)]), 1e-9);
  const [left, right] = [NAMES + 40, WIDTH - 80];
  const middle = (left + right) / 2;
  const width = (value) => (Math.abs(value) / most) * ((right - left) / 2 - 40);
  const bar = (value, y, name) => {
    const way = value < 0 ? -1 : 1;
    const end = middle + way * (width(value) + 5);
    return [
      svg("rect", { x: Math.min(middle, middle + way * width(value)), y, width: Math.max(width(value), 0.5), height: 11, class: name }),
      label(end, y + 10, way < 0 ? "value end" : "value", signed(value, 4)),
    ];
  };
  const told = `Predicted and measured change of ${tokens.length} tokens by one step; the table has the numbers.`;
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${height}`, class: "picture", role: "img", "aria-label": told },
    label(middle, 14, "axis middle", "change in nats: predicted (outline), measured (filled)"),
    svg("line", { x1: middle, x2: middle, y1: 22, y2: height, class: "rule" }),
    tokens.map(({ text, step }, i) => {
      const y = 28 + i * ROW;
      return [
        label(NAMES, y + 16, "name", shortened(visible(text), 18)),
        bar(step.predicted, y, "bar-predicted"),
        bar(step.measured, y + 13, "bar-after"),
      ];
    }),
  );
}
