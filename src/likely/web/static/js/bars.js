// Where the probability went: bars of the wanted token, its rivals and everything else, before and after a training.

import { label, svg } from "./dom.js";
import { percent, shortened, signed, visible } from "./format.js";

const WIDTH = 394;
const ROW = 44;
const HEAD = 34;
const BAR = 13;
const NAMES = 120; // where the bars begin
const CHANCE = 140; // width of probability 1
const MIDDLE = 354; // zero of p - onehot
const PUSH = 32; // width of 1 there

/**
 * rows: [{text, gold, before, after, gradient_before, gradient_after}]; before is null where there is no base model.
 * The gradient shown is the one after.
 */
export function bars(rows) {
  const height = HEAD + rows.length * ROW + 4;
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${height}`, class: "picture", role: "img", "aria-label": told(rows) },
    label(NAMES, 14, "axis", rows.some(hasBefore) ? "before (outline), after" : "chance"),
    label(MIDDLE, 14, "axis middle", "p − onehot"),
    svg("line", { x1: MIDDLE, x2: MIDDLE, y1: HEAD - 10, y2: height, class: "rule" }),
    rows.map((row, i) => drawRow(row, HEAD + i * ROW)),
  );
}

const hasBefore = (row) => row.before !== null && row.before !== undefined;

function drawRow(row, y) {
  const name = row.gold || !isRest(row) ? shortened(visible(row.text), 13) : row.text;
  const both = hasBefore(row);
  const lines = [
    label(NAMES - 10, y + 15, row.gold ? "name gold" : "name", name),
    row.gold && label(NAMES - 10, y + 29, "axis end", "wanted"),
    both && bar(row.before, y, "before"),
    bar(row.after, both ? y + BAR + 3 : y + 4, "after"),
  ];
  const push = row.gradient_after;
  if (typeof push === "number") {
    const width = Math.abs(push) * PUSH;
    lines.push(
      svg("rect", { x: push < 0 ? MIDDLE - width : MIDDLE, y: y + 3, width, height: BAR, class: push < 0 ? "pushed-up" : "pushed-down" }),
      label(MIDDLE, y + 30, "axis middle over", signed(push, Math.abs(push) < 0.01 ? 4 : 2)),
    );
  }
  return lines.filter(Boolean);
}

const isRest = (row) => !row.gold && row.text === "everything else";

const bar = (value, y, name) => [
  svg("rect", { x: NAMES, y, width: Math.max(value * CHANCE, 1), height: BAR, class: `bar-${name}` }),
  label(NAMES + value * CHANCE + 6, y + BAR - 2, "value", percent(value)),
];

function told(rows) {
  const parts = rows.map((row) => {
    const name = row.gold ? `wanted token ${visible(row.text)}` : visible(row.text);
    return `${name} ${hasBefore(row) ? `${percent(row.before)} before, ` : ""}${percent(row.after)}${hasBefore(row) ? " after" : ""}`;
  });
  return `Chance of the next token: ${parts.join("; ")}.`;
}

/** The same as cells, with a header. */
export const barRows = (rows) => [
  ["token", "wanted", "chance before", "chance after", "p-onehot before", "p-onehot after"],
  ...rows.map((r) => [r.text, r.gold ? 1 : 0, r.before, r.after, r.gradient_before, r.gradient_after]),
];
