// Pictures and tables as files.

import { h } from "./dom.js";

const DRAWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight", "text-anchor", "paint-order"];

export function download(name, blob) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** rows: arrays of cells, the first one the header. */
export function csv(rows) {
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function cell(value) {
  if (value === null || value === undefined) return "";
  // A spreadsheet would read such a text as a formula.
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export const saveCsv = (name, rows) => download(`${name}.csv`, new Blob([csv(rows)], { type: "text/csv;charset=utf-8" }));

/** The picture as a file of its own: what the style sheet gave its parts is written into them. */
export function saveSvg(name, picture) {
  const copy = picture.cloneNode(true);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  const { width, height } = picture.viewBox.baseVal;
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.setAttribute("font-family", "system-ui, sans-serif");
  const pairs = [...picture.querySelectorAll("*")].map((own, i) => [own, copy.querySelectorAll("*")[i]]);
  for (const [own, other] of pairs) {
    const style = getComputedStyle(own);
    for (const property of DRAWN) other.setAttribute(property, style.getPropertyValue(property));
    other.removeAttribute("class");
  }
  const paper = picture.ownerDocument.createElementNS(copy.namespaceURI, "rect");
  for (const [key, value] of Object.entries({ width: "100%", height: "100%", fill: paperColour() })) paper.setAttribute(key, value);
  copy.prepend(paper);
  download(`${name}.svg`, new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
}

/** A canvas as PNG, on paper of the theme. */
export function savePng(name, canvas) {
  const sheet = h("canvas", { width: canvas.width, height: canvas.height });
  const pen = sheet.getContext("2d");
  pen.fillStyle = paperColour();
  pen.fillRect(0, 0, sheet.width, sheet.height);
  pen.drawImage(canvas, 0, 0);
  sheet.toBlob((blob) => download(`${name}.png`, blob), "image/png");
}

const paperColour = () => getComputedStyle(document.body).backgroundColor;
