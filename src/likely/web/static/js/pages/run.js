// One run: its verdict, its curve, and what it is made of; beside another run where one is chosen.

import { get } from "../api.js";
import { Curve, MEASURES } from "../curve.js";
import { announce, fill, h } from "../dom.js";
import { figure } from "../figure.js";
import { count, duration, harmless, many } from "../format.js";
import { term } from "../glossary.js";
import { Live } from "../live.js";
import { quiet, select } from "../parts.js";
import { navigate, place, remember } from "../router.js";
import { outcome } from "./outcome.js";
import { origins, settings, supervised } from "./recipe.js";
import { stateBadge } from "./runs.js";

export async function runPage({ view, parameters, query, signal }) {
  const page = new RunPage({ view, query, signal });
  await page.open(parameters.run, query.get("with"));
  return page.runs[0].entry.name;
}

class RunPage {
  constructor({ view, query, signal }) {
    Object.assign(this, { view, signal, runs: [], measure: MEASURES[query.get("plot")] ? query.get("plot") : "nll" });
    this.head = h("div", {});
    this.chart = h("div", {});
    this.below = h("div", {});
  }

  async open(...ids) {
    const opened = ids.filter(Boolean).map((id) => this.load(id));
    const [known, ...runs] = await Promise.all([get("/runs", { signal: this.signal }), ...opened]);
    Object.assign(this, { runs, others: known.runs.filter((run) => run.id !== ids[0]) });
    fill(this.view, this.head, this.chart, this.below);
    this.drawHead();
    this.drawChart();
    this.drawBelow();
    // Not before: what is told at once has to have a place.
    for (const { entry, live } of runs) if (entry.state !== "finished") live.listen();
  }

  async load(id) {
    const entry = await get(`/runs/${id}`, { signal: this.signal });
    const live = new Live(id, {
      signal: this.signal,
      onMetrics: () => this.grown(),
      onState: (state) => this.changed(run, state),
    });
    const run = { entry, live };
    await live.open();
    return run;
  }

  grown() {
    this.waiting ??= setTimeout(() => {
      this.waiting = null;
      if (this.signal.aborted) return;
      this.curve.runs = this.shapes();
      this.curve.update();
      this.drawHead();
    }, 300);
  }

  async changed(run, state) {
    const before = run.entry.state;
    Object.assign(run.entry, state);
    if (state.state !== before) {
      run.entry = await get(`/runs/${run.entry.id}`, { signal: this.signal });
      announce(run.entry.told);
      this.curve.runs = this.shapes();
      this.curve.update();
      this.drawBelow();
    }
    this.drawHead();
  }

  shapes() {
    return this.runs.map(({ entry, live }) => ({
      name: harmless(entry.name),
      steps: live.metrics.steps,
      evaluations: withLast(entry, live.metrics),
      base: entry.report?.base ?? null,
      floor: entry.report?.entropy_floor ?? null,
    }));
  }

  drawHead() {
    const [{ entry }] = this.runs;
    fill(
      this.head,
      h("div", { class: "title-row" }, h("h1", {}, harmless(entry.name)), stateBadge(entry), this.compareWith()),
      this.runs.map((run) => h("div", { class: "verdict" }, this.runs.length > 1 && h("h2", {}, harmless(run.entry.name)), verdict(run), pace(run))),
    );
  }

  compareWith() {
    if (!this.others.length) return null;
    const onChoose = (other) => navigate(place().path, { ...Object.fromEntries(place().query), with: other });
    const options = [["", "no other run"], ...this.others.map(({ id, name }) => [id, harmless(name)])];
    return h("label", { class: "beside" }, "Beside ", select(options, { chosen: this.runs[1]?.entry.id, onChoose }));
  }

  drawChart() {
    this.curve = new Curve({ runs: this.shapes(), measure: this.measure, signal: this.signal });
    const onChoose = (measure) => {
      this.measure = measure;
      remember({ plot: measure === "nll" ? null : measure });
      this.drawChart();
      this.chart.querySelector("select").focus();
    };
    const measures = Object.entries(MEASURES).map(([key, [words]]) => [key, words]);
    const picture = figure({
      name: `${this.runs[0].entry.name}-${this.measure}`,
      title: "While training",
      picture: this.curve.element,
      rows: () => this.curve.rows(),
      caption: [
        ...(this.measure === "nll" ? [term("nll", "Loss"), ", lower is better; each step before its update. "] : []),
        averaged(this.runs[0].live.metrics),
        "Drag over the chart to look closer, double-click to see all. With the chart in focus, arrow keys read it.",
      ],
    });
    picture.querySelector(".tools").prepend(h("label", {}, "Show ", select(measures, { chosen: this.measure, onChoose })));
    fill(this.chart, picture);
    this.curve.draw();
  }

  drawBelow() {
    const entries = this.runs.map(({ entry }) => entry);
    fill(this.below, outcome(entries), supervised(entries), settings(entries), origins(entries));
  }
}

/** Without evaluations on the way, the report still knows the last score. */
function withLast({ report }, { evaluations, steps }) {
  const last = report?.last_step?.step ?? steps.step.at(-1);
  if (!report?.tuned || last === undefined || evaluations.some(({ step }) => step === last)) return evaluations;
  const { nll, ci95 } = report.tuned;
  return [...evaluations, { step: last, nll, low: ci95?.[0] ?? null, high: ci95?.[1] ?? null }];
}

const averaged = ({ every }) => (every > 1 ? `Each point is the mean of ${count(every)} steps. ` : "");

const verdict = ({ entry }) => h("p", { class: "verdict-words" }, harmless(entry.verdict ?? entry.told));

/** How far it is and how long it will take; a finished run needs neither. */
function pace({ entry, live }) {
  const { pace: own, skipped } = live.metrics;
  const lines = [];
  if (entry.verdict && entry.state !== "finished") lines.push(h("p", {}, entry.told));
  if (entry.state !== "finished" && own?.num_steps) {
    const left = entry.state === "running" && own.seconds_left !== null ? `, about ${duration(own.seconds_left)} left` : "";
    const speed = own.tokens_per_second ? `, ${count(own.tokens_per_second)} tokens/s` : "";
    const words = `step ${count(own.step)} of ${count(own.num_steps)}${speed}${left}`;
    const bar = h("progress", { max: own.num_steps, value: own.step, "aria-label": "Steps done" });
    lines.push(h("div", { class: "progress" }, bar, h("span", { class: "progress-words" }, words)));
  }
  if (skipped.length) lines.push(quiet(`${many(skipped.length, "step")} left out; the last: ${harmless(skipped.at(-1).told)}`));
  return lines;
}
