// The frame of every picture: a heading, what it shows in words, and its files.

import { h } from "./dom.js";
import { saveCsv, savePng, saveSvg } from "./export.js";
import { button } from "./parts.js";

/**
 * A figure.
 *
 * name: of its files. picture: an SVG element, or an element that holds a canvas. rows: `() => [[...]]`, its data with a
 * header, for the CSV file. table: an element with the same in numbers, shown on demand.
 */
export function figure({ name, title, caption, picture, rows, table }) {
  const vector = picture.localName === "svg";
  const kind = vector ? "SVG" : "PNG";
  const save = vector ? () => saveSvg(name, picture) : () => savePng(name, picture.querySelector("canvas"));
  const file = (words, act, label) => button(words, act, { class: "quiet", "aria-label": `${label} as ${words}` });
  return h(
    "figure",
    { class: "figure" },
    h(
      "div",
      { class: "figure-head" },
      title && h("h2", {}, title),
      h(
        "div",
        { class: "tools" },
        file(kind, save, `Save ${title ?? name}`),
        rows && file("CSV", () => saveCsv(name, rows()), `Save the numbers of ${title ?? name}`),
      ),
    ),
    picture,
    caption && h("figcaption", {}, caption),
    table && h("details", {}, h("summary", {}, "In numbers"), table),
  );
}
