// Loss of each example before and after: below the diagonal it became more likely.

import { label, svg } from "./dom.js";
import { count, number, ticks } from "./format.js";

const SIZE = 360;
const LEFT = 46;
const TOP = 12;
const INNER = SIZE - LEFT - TOP;

/** points: {id, base, tuned}, columns; nats per token. `open(id)` is called for a point that is clicked. */
export function scatter(points, open) {
  const [low, high] = ends([...points.base, ...points.tuned]);
  const along = (value) => ((Math.min(Math.max(value, low), high) - low) / (high - low)) * INNER;
  const x = (value) => LEFT + along(value);
  const y = (value) => TOP + INNER - along(value);
  const worse = points.id.filter((_, i) => points.tuned[i] > points.base[i]).length;
  const marks = points.id.map((id, i) => {
    const [across, down] = [x(points.base[i]), y(points.tuned[i])];
    return points.tuned[i] > points.base[i]
      ? svg("path", { d: `M${across - 3} ${down - 3}l6 6m0-6l-6 6`, class: "worse", "data-id": id })
      : svg("circle", { cx: across, cy: down, r: 3, class: "better", "data-id": id });
  });
  return svg(
    "svg",
    {
      viewBox: `0 0 ${SIZE} ${SIZE}`,
      class: "picture scatter",
      role: "img",
      "aria-label": told(points.id.length, worse),
      onclick: (event) => event.target.dataset.id !== undefined && open(event.target.dataset.id),
    },
    ticks(low, high).map((tick) => [
      svg("line", { x1: LEFT, x2: LEFT + INNER, y1: y(tick), y2: y(tick), class: "grid" }),
      label(LEFT - 6, y(tick) + 4, "axis end", number(tick, high - low < 2 ? 2 : 1)),
      label(x(tick), TOP + INNER + 16, "axis middle", number(tick, high - low < 2 ? 2 : 1)),
    ]),
    svg("line", { x1: x(low), y1: y(low), x2: x(high), y2: y(high), class: "rule" }),
    marks,
    label(LEFT + INNER / 2, SIZE - 8, "axis middle", "loss before, nats per token"),
    label(LEFT + 8, TOP + 14, "axis strong over", "✕ less likely now"),
    label(LEFT + INNER - 8, TOP + INNER - 10, "axis strong end over", "● more likely now"),
    svg("text", { transform: `translate(11 ${TOP + INNER / 2}) rotate(-90)`, class: "axis middle" }, "loss after"),
  );
}

const told = (all, worse) =>
  `Loss of ${count(all)} examples before and after, ${count(worse)} of them less likely now. The table lists them.`;

/** The ends of the axes: few points are beyond, and those are drawn at the edge. */
function ends(values) {
  const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))] ?? 0;
  const room = Math.max((at(0.995) - at(0.005)) * 0.08, 0.01);
  return [Math.max(0, at(0.005) - room), at(0.995) + room];
}

export const scatterRows = (points) => [
  ["row", "nll_base", "nll_tuned"],
  ...points.id.map((id, i) => [id, points.base[i], points.tuned[i]]),
];
