// Elements from plain text. Data reaches the page through here, as text nodes and attributes: nothing is parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. A property whose name starts with `on` is a listener; null, undefined and false leave one out. */
export function h(name, properties = {}, ...children) {
  return furnish(document.createElement(name), properties, children);
}

/** An SVG element, with the same conventions. */
export function svg(name, properties = {}, ...children) {
  return furnish(document.createElementNS(SVG, name), properties, children);
}

/** A line of text in a picture. */
export const label = (x, y, name, words) => svg("text", { x, y, class: name }, words);

function furnish(element, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...present(children));
  return element;
}

/** Put new children in the place of all that an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...present(children));
  return element;
}

function present(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** A number that no other element of the page has, for ids that labels and descriptions refer to. */
export const unique = ((last) => () => `e${(last += 1)}`)(0);

/** Say something to screen readers, without moving the focus. */
export function announce(text) {
  const live = document.getElementById("live");
  if (live.textContent !== text) live.textContent = text;
}

/** The colour that a custom property of the style sheet has in the theme of the moment, such as `rgb(36, 95, 158)`. */
export function colourOf(property) {
  const probe = document.body.appendChild(document.createElement("span"));
  probe.style.color = `var(${property})`;
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
