// Loss of each example before and after: below the diagonal it became more likely.

import { label, svg } from "./dom.js";
import { count, number } from "./format.js";

const SIZE = 440;
const LEFT = 46;
const TOP = 12;
const INNER = SIZE - LEFT - TOP;

/** points: {id, base, tuned}, columns; nats per token. `open(id)` is called for a point that is clicked. */
export function scatter(points, open) {
  const top = highest([...points.base, ...points.tuned]);
  const x = (value) => LEFT + (Math.min(value, top) / top) * INNER;
  const y = (value) => TOP + INNER - (Math.min(value, top) / top) * INNER;
  const worse = points.id.filter((_, i) => points.tuned[i] > points.base[i]).length;
  const marks = points.id.map((id, i) => {
    const [across, down] = [x(points.base[i]), y(points.tuned[i])];
    return points.tuned[i] > points.base[i]
      ? svg("path", { d: `M${across - 3} ${down - 3}l6 6m0-6l-6 6`, class: "worse", "data-id": id })
      : svg("circle", { cx: across, cy: down, r: 3, class: "better", "data-id": id });
  });
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => share * top);
  return svg(
    "svg",
    {
      viewBox: `0 0 ${SIZE} ${SIZE + 24}`,
      class: "picture scatter",
      role: "img",
      "aria-label": told(points.id.length, worse),
      onclick: (event) => event.target.dataset.id !== undefined && open(event.target.dataset.id),
    },
    ticks.map((tick) => [
      svg("line", { x1: LEFT, x2: LEFT + INNER, y1: y(tick), y2: y(tick), class: "grid" }),
      label(LEFT - 6, y(tick) + 4, "axis end", number(tick, top < 4 ? 2 : 1)),
      label(x(tick), TOP + INNER + 16, "axis middle", number(tick, top < 4 ? 2 : 1)),
    ]),
    svg("line", { x1: x(0), y1: y(0), x2: x(top), y2: y(top), class: "rule" }),
    marks,
    label(LEFT + INNER / 2, SIZE + 18, "axis middle", "loss before, nats per token"),
    label(LEFT + 8, TOP + 14, "axis strong", "✕ less likely now"),
    label(LEFT + INNER - 8, TOP + INNER - 10, "axis strong end", "● more likely now"),
    svg("text", { transform: `translate(11 ${TOP + INNER / 2}) rotate(-90)`, class: "axis middle" }, "loss after"),
  );
}

const told = (all, worse) =>
  `Loss of ${count(all)} examples before and after, ${count(worse)} of them less likely now. The table lists them.`;

/** The end of the axes: a round number that few points are beyond, and those are drawn at the edge. */
function highest(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const most = Math.max((sorted[Math.floor(sorted.length * 0.995)] ?? sorted.at(-1) ?? 1) * 1.05, 0.01);
  const unit = 10 ** Math.floor(Math.log10(most));
  return Math.ceil(most / unit / 0.5) * unit * 0.5;
}

export const scatterRows = (points) => [
  ["row", "nll_base", "nll_tuned"],
  ...points.id.map((id, i) => [id, points.base[i], points.tuned[i]]),
];
