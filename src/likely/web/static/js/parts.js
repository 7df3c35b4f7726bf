// Small parts that several pages have: tables, notices, and work that is under way.

import { aborted, work } from "./api.js";
import { announce, fill, h, unique } from "./dom.js";
import { count, duration } from "./format.js";

/** A table. columns: [{name, head, number, long, cell: (row) => child}]; `head` marks the cell that names the row. */
export function table({ caption, columns, rows, hideCaption = false }) {
  const header = columns.map(({ name, number }) =>
    name ? h("th", { scope: "col", class: number ? "number" : null }, name) : h("td", {}),
  );
  const body = rows.map((row) =>
    h(
      "tr",
      {},
      columns.map(({ cell, number, long, head }) =>
        h(head ? "th" : "td", { scope: head ? "row" : null, class: number ? "number" : long ? "long" : null }, cell(row)),
      ),
    ),
  );
  const title = h("caption", { class: hideCaption ? "unseen" : null }, caption);
  return scrollable(h("table", {}, title, h("thead", {}, h("tr", {}, header)), h("tbody", {}, body)), caption);
}

/** A holder in which wide content scrolls; it can be reached by keyboard where there is something to scroll. */
export function scrollable(content, label) {
  const holder = h("div", { class: "scroll" }, content);
  const reachable = { tabindex: "0", role: "region", "aria-label": label };
  new ResizeObserver(() => {
    const wide = holder.scrollWidth > holder.clientWidth + 1;
    for (const [key, value] of Object.entries(reachable)) {
      if (wide) holder.setAttribute(key, value);
      else holder.removeAttribute(key);
    }
  }).observe(holder);
  return holder;
}

export const quiet = (...children) => h("p", { class: "quiet-text" }, children);

export const button = (words, onclick, properties = {}) => h("button", { type: "button", onclick, ...properties }, words);

/** A choice of one. options: [[value, words]]; `onChoose` gets the value. */
export function select(options, { chosen, onChoose, ...properties }) {
  const own = ([value, words]) => h("option", { value, selected: String(value) === String(chosen ?? "") }, words);
  return h("select", { onchange: ({ target }) => onChoose(target.value), ...properties }, options.map(own));
}

/** Names and values; those that are not known are left out. */
export function facts(pairs, name = "facts") {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("dl", { class: name }, known.map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, value))));
}

/** A sentence instead of what could not be shown. */
export const notice = (text, ...more) => h("div", { class: "notice" }, text && h("p", {}, text), more);

export const failure = (error) => h("div", { class: "notice bad", role: "alert" }, h("p", {}, error.message));

/** Draw what a promise brings, or why it did not come; a page that was left is not drawn. */
export async function settle(holder, promise, draw) {
  try {
    const found = await promise;
    fill(holder, draw(found));
  } catch (error) {
    if (!aborted(error)) fill(holder, failure(error));
  }
}

/** A bar of what a job is at. `show(job)` draws it; `onCancel` puts a button beside it. */
export function progressBar({ label, onCancel }) {
  const id = unique();
  const bar = h("progress", { "aria-labelledby": id });
  const words = h("span", { id, class: "progress-words" }, label);
  const cancel = onCancel && h("button", { type: "button", onclick: onCancel }, "Cancel");
  const element = h("div", { class: "progress" }, bar, words, cancel);
  const show = (job) => {
    if (job.total) {
      bar.max = job.total;
      bar.value = Math.min(job.done, job.total);
    } else bar.removeAttribute("value");
    words.textContent = told(label, job);
    announce(job.state === "waiting" ? `${label}: waiting` : label);
  };
  return { element, show };
}

/**
 * The result of a job, with a bar in `holder` that tells how far it is and can cancel it; then it rejects. asked: a
 * request, or the id of a job. Whoever leaves the page cancels it too, unless it `stays`.
 */
export async function watch(holder, label, asked, signal, { stays = false } = {}) {
  const own = new AbortController();
  const bar = progressBar({ label, onCancel: () => own.abort() });
  fill(holder, bar.element);
  try {
    const both = AbortSignal.any([own.signal, signal]);
    return await work(asked, { signal: both, cancel: stays ? own.signal : both, progress: bar.show });
  } finally {
    if (holder.firstChild === bar.element) fill(holder);
  }
}

function told(label, job) {
  if (job.state === "waiting") return job.ahead ? `${label}: waiting, ${count(job.ahead)} before it` : `${label}: about to start`;
  const share = job.total ? `, ${count(job.done)} of ${count(job.total)}` : "";
  const seconds = job.seconds > 1 ? `, ${duration(job.seconds)}` : "";
  return `${label}: ${job.title || "working"}${share}${seconds}`;
}

/** A group of radio buttons that look like one switch. options: [[value, text, disabled]]. */
export function switcher({ label, options, value, onChange }) {
  const name = unique();
  const choice = ([own, text, disabled]) =>
    h(
      "label",
      {},
      h("input", { type: "radio", name, value: own, checked: own === value, disabled, onchange: () => onChange(own) }),
      h("span", {}, text),
    );
  return h("fieldset", { class: "switcher" }, h("legend", {}, label), options.map(choice));
}
