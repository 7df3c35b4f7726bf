// All runs of the viewer, and scores that belong to none of them.

import { get, wait } from "../api.js";
import { fill, h } from "../dom.js";
import { count, harmless, many } from "../format.js";
import { notice, table } from "../parts.js";
import { address } from "../router.js";

const SIGNS = { running: "▶", finished: "✓", stopped: "■", stale: "!" };
const LOOK = 3000; // milliseconds between looks at what is new
const NONE = "There is no run here yet. Start one with `likely train`, and name its folder to `likely view`.";

export async function runsPage({ view, signal }) {
  const read = () => Promise.all([get("/runs", { signal }), get("/scores", { signal })]);
  const first = await read();
  if (first[0].runs.length === 1) {
    location.replace(address(`/run/${first[0].runs[0].id}`));
    return "likely";
  }
  draw(view, first);
  keep(view, read, first, signal).catch(() => {});
  return "Runs";
}

/** Draw the lists again whenever they change. */
async function keep(view, read, shown, signal) {
  for (let last = JSON.stringify(shown); ; ) {
    await wait(LOOK, signal);
    const found = await read();
    if (JSON.stringify(found) === last) continue;
    last = JSON.stringify(found);
    const focused = view.contains(document.activeElement) && document.activeElement.getAttribute("href");
    draw(view, found);
    if (focused) view.querySelector(`a[href="${focused}"]`)?.focus();
  }
}

const draw = (view, [{ runs }, { sets }]) =>
  fill(view, h("h1", {}, "Runs"), runs.length ? listOfRuns(runs) : notice(NONE), sets.length > 0 && listOfSets(sets));

/** In what state a run is, as a word with a sign of its own. */
export const stateBadge = ({ state }) =>
  h("span", { class: `badge ${state}` }, h("span", { "aria-hidden": "true" }, SIGNS[state] ?? "?"), ` ${state}`);

const listOfRuns = (runs) =>
  table({
    caption: "Runs of this viewer",
    hideCaption: true,
    rows: runs,
    columns: [
      { name: "Run", head: true, cell: (run) => h("a", { href: address(`/run/${run.id}`) }, harmless(run.name)) },
      { name: "State", cell: stateBadge },
      { name: "Step", number: true, cell: (run) => (run.num_steps ? `${count(run.step)} of ${count(run.num_steps)}` : count(run.step)) },
      { name: "Verdict", long: true, cell: (run) => harmless(run.verdict ?? run.told) },
    ],
  });

function listOfSets(sets) {
  const link = ({ id, name, rows }) => h("li", {}, h("a", { href: address(`/scores/${id}`) }, harmless(name)), rows === null ? ", not indexed yet" : `, ${many(rows, "row")}`);
  return h("section", {}, h("h2", {}, "Scored rows"), h("ul", {}, sets.map(link)));
}
