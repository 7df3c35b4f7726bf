// How long the examples are, and where the longest allowed one would end.

import { label, svg } from "./dom.js";
import { count, ticks } from "./format.js";

const WIDTH = 720;
const HEIGHT = 240;
const LEFT = 54;
const BOTTOM = 40;

/** lengths: {edges, counts, limit}, in tokens. */
export function histogram({ edges, counts, limit }) {
  const most = Math.max(...counts, 1);
  const far = limit > 3 * edges.at(-1);
  const end = far ? edges.at(-1) : Math.max(edges.at(-1), limit * 1.04);
  const x = (tokens) => LEFT + (tokens / end) * (WIDTH - LEFT - 16);
  const y = (number) => HEIGHT - BOTTOM - (number / most) * (HEIGHT - BOTTOM - 24);
  const total = counts.reduce((sum, number) => sum + number, 0);
  const bars = counts.map((number, i) => {
    const [left, right] = [x(edges[i]), x(edges[i + 1])];
    const size = { width: Math.max(right - left - 1, 0.5), height: HEIGHT - BOTTOM - y(number) };
    return svg("rect", { x: left, y: y(number), ...size, class: edges[i] > limit ? "bar-over" : "bar-after" });
  });
  return svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      class: "picture",
      role: "img",
      "aria-label": `Lengths of ${count(total)} examples, up to ${count(edges.at(-1))} tokens. The cut line is at ${count(limit)} tokens.`,
    },
    ticks(0, most).filter(Number.isInteger).map((tick) => [
      svg("line", { x1: LEFT, x2: WIDTH - 16, y1: y(tick), y2: y(tick), class: "grid" }),
      label(LEFT - 8, y(tick) + 4, "axis end", count(tick)),
    ]),
    bars,
    far
      ? label(WIDTH - 16, 14, "axis strong end", `cut line far to the right, ${count(limit)} tokens →`)
      : [
          svg("line", { x1: x(limit), x2: x(limit), y1: 18, y2: HEIGHT - BOTTOM, class: "cut" }),
          label(Math.min(x(limit), WIDTH - 16), 12, "axis strong end", `cut line, ${count(limit)} tokens`),
        ],
    ticks(0, end).map((tick) => label(x(tick), HEIGHT - BOTTOM + 16, "axis middle", count(tick))),
    label(LEFT + (WIDTH - LEFT) / 2, HEIGHT - 4, "axis middle", "tokens of an example"),
  );
}

export const histogramRows = ({ edges, counts }) => [
  ["from_tokens", "below_tokens", "examples"],
  ...counts.map((number, i) => [edges[i], edges[i + 1], number]),
];
