// What a run is made of: which tokens are trained, its settings, and the hashes of what went in.

import { h } from "../dom.js";
import { count, harmless, percent } from "../format.js";
import { term } from "../glossary.js";
import { table } from "../parts.js";

/** Counts per role of what is trained. */
export function supervised(entries) {
  const known = entries.filter(({ origins: own }) => own?.supervised);
  if (!known.length) return null;
  const title = h("h2", {}, "What is ", term("trained", "trained"));
  return h("section", {}, title, known.map((entry) => roles(entry, entries.length > 1)));
}

function roles({ name, origins: own }, named) {
  const share = ({ tokens, supervised: part }) => (tokens ? part / tokens : 0);
  const bar = (row) => h("meter", { max: 1, value: share(row), "aria-label": `Share of ${row.role} tokens that are trained` });
  const rows = Object.entries(own.supervised).map(([role, counts]) => ({ role, ...counts }));
  const total = rows.reduce((sum, row) => sum + row.tokens, 0);
  const trained = rows.reduce((sum, row) => sum + row.supervised, 0);
  const what = own.num_trainable ? ` ${count(own.num_trainable)} of ${count(own.num_parameters)} weights learn.` : "";
  return h(
    "div",
    {},
    named && h("h3", {}, harmless(name)),
    h("p", {}, `${count(trained)} of ${count(total)} tokens are trained; the others are only read.${what}`),
    table({
      caption: named ? `Tokens by role, ${harmless(name)}` : "Tokens by role",
      hideCaption: true,
      rows,
      columns: [
        { name: "Role", head: true, cell: (row) => row.role },
        { name: "Tokens", number: true, cell: (row) => count(row.tokens) },
        { name: "Trained", number: true, cell: (row) => count(row.supervised) },
        { name: "Share", number: true, cell: (row) => percent(share(row)) },
        { name: "", cell: bar },
      ],
    }),
  );
}

/** Settings; of two runs, those that differ are marked. */
export const settings = (entries) => facts("Settings", entries, ({ config }) => flat(config ?? {}));

/** Hashes, versions and device. */
export const origins = (entries) => facts("Where it comes from", entries, ({ origins: own }) => flat({ ...own, supervised: null }));

function facts(title, entries, of) {
  const found = entries.map(of);
  const names = [...new Set(found.flatMap((own) => Object.keys(own)))];
  if (!names.length) return null;
  const rows = names.map((name) => ({ name, values: found.map((own) => own[name] ?? "–") }));
  const differing = rows.filter(({ values }) => new Set(values).size > 1);
  const sorted = entries.length > 1 ? [...differing, ...rows.filter((row) => !differing.includes(row))] : rows;
  const value = (row, i) => h("code", { class: differing.includes(row) ? "differs" : null }, harmless(row.values[i]));
  const summary = entries.length > 1 ? `${title}: ${count(differing.length)} differ` : title;
  return h(
    "details",
    { class: "section", open: entries.length > 1 },
    h("summary", {}, h("h2", {}, summary)),
    table({
      caption: title,
      hideCaption: true,
      rows: sorted,
      columns: [
        { name: "Name", head: true, cell: (row) => h("code", {}, row.name) },
        ...entries.map(({ name }, i) => ({ name: entries.length > 1 ? harmless(name) : "Value", cell: (row) => value(row, i) })),
        ...(entries.length > 1 ? [{ name: "", cell: (row) => (differing.includes(row) ? "differs" : "") }] : []),
      ],
    }),
  );
}

/** Nested values as lines of `a.b` -> text. */
function flat(value, name = "") {
  if (value !== null && typeof value === "object") {
    const parts = Object.entries(value).map(([key, own]) => flat(own, name ? `${name}.${key}` : key));
    return Object.assign({}, ...parts);
  }
  return value === null || value === "" ? {} : { [name]: String(value) };
}
