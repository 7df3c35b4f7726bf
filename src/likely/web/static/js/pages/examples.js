// Which scored rows there are, how to get them, and their table.

import { aborted, get, jobOf, wait } from "../api.js";
import { fill, h } from "../dom.js";
import { harmless } from "../format.js";
import { RowsTable } from "../rows.js";
import { button, failure, progressBar, quiet, select, watch } from "../parts.js";
import { navigate } from "../router.js";

const UNSCORED =
  "No rows of this run are scored yet. Scoring looks at each held-out row once with the base model and once with the " +
  "tuned one, and writes nothing into the run.";

/** The scored rows of a run; where there are none yet, how to get them. */
export async function runExamplesPage({ view, parameters, signal }) {
  const [run, { sets }] = await Promise.all([get(`/runs/${parameters.run}`, { signal }), get("/scores", { signal })]);
  const own = run.scores ?? [];
  const others = sets.filter(({ id }) => !own.some((set) => set.id === id));
  if (own.length) await showSet({ view, set: own[0], sets: [...own, ...others], run: run.id, signal });
  else fill(view, heading(others, null, run.id), unscored(run, await jobOf(run.id, "score", ["waiting", "running"], signal), signal));
  return "Examples";
}

/** The rows of one file of scores. */
export async function examplesPage({ view, parameters, run, signal }) {
  const [set, { sets }] = await Promise.all([get(`/scores/${parameters.set}`, { signal }), get("/scores", { signal })]);
  await showSet({ view, set, sets, run, signal });
  return `Examples of ${set.name}`;
}

/** The offer to score the held-out rows, or how far that is: it goes on when the page is left. */
function unscored(run, job, signal) {
  const holder = h("div", { class: "notice" });
  const start = async (asked) => {
    try {
      const { set } = await watch(holder, "Scoring the held-out rows", asked, signal, { stays: true });
      navigate(`/scores/${set}`, { run: run.id });
    } catch (error) {
      if (!signal.aborted) offer(aborted(error) ? null : failure(error));
    }
  };
  const ask = button("Score the held-out rows", () => start({ kind: "score", run: run.id }), { class: "main" });
  const offer = (error) => fill(holder, error, h("p", {}, UNSCORED), run.can_score ? ask : quiet(run.can_score_told));
  if (job) start(job);
  else offer(null);
  return holder;
}

async function showSet({ view, set, sets, run, signal }) {
  const holder = h("div", {});
  fill(view, heading(sets, set, run), holder);
  const whole = await ready(set, holder, signal);
  if (!whole) return;
  const rows = new RowsTable({ set: whole, run, signal });
  fill(holder, rows.element);
  await rows.refresh();
}

/** The set once its index is built; until then it is told how far that is. Null where it can't be built. */
async function ready(set, holder, signal) {
  if (set.state === "ready") return set;
  const bar = progressBar({ label: "Building the index of the rows, once" });
  fill(holder, bar.element);
  for (let now = set; ; now = await get(`/scores/${set.id}`, { signal })) {
    if (now.state === "ready") return now;
    if (now.state === "failed") {
      fill(holder, failure({ message: now.error ?? "The scores can't be read." }));
      return null;
    }
    bar.show({ state: now.state, done: now.done, total: now.total, title: now.unit });
    await wait(500, signal);
  }
}

/** The title, and the choice of another file of scores. */
function heading(sets, set, run) {
  const options = [...(set ? [] : [["", "choose"]]), ...sets.map(({ id, name }) => [id, harmless(name)])];
  const chooser = select(options, { chosen: set?.id, onChoose: (id) => id && navigate(`/scores/${id}`, { run }) });
  const shown = options.length > 1 ? h("label", { class: "beside" }, "Scores ", chooser) : null;
  return h("div", { class: "title-row" }, h("h1", {}, "Examples"), shown);
}
