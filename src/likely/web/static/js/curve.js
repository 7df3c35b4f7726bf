// A run's measures over its steps: what was logged, a running mean of it, and held-out scores with their band.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { colourOf, fill, h } from "./dom.js";
import { count, number } from "./format.js";

const HEIGHT = 340;
const MEMORY = 0.9; // of the running mean
const FONT = "12px system-ui, sans-serif";
const COLOURS = ["ink", "dim", "line", "paper", "before", "after", "after-band"];
const WHOLE = [1, 2, 5].flatMap((unit) => [0, 1, 2, 3, 4, 5, 6].map((power) => unit * 10 ** power)).sort((a, b) => a - b);

/** What can be drawn: name -> [words, the value at a step, digits]. */
export const MEASURES = {
  nll: ["Loss", (steps, i) => steps.nll[i], 4],
  grad_norm: ["Gradient norm", (steps, i) => steps.grad_norm[i], 3],
  learning_rate: ["Learning rate", (steps, i) => steps.learning_rate[i], 7],
  speed: ["Tokens per second", (steps, i) => steps.tokens[i] / steps.seconds[i], 0],
};

/**
 * One run as the chart sees it: {name, steps, evaluations, base, floor}; steps and evaluations as the server gives them,
 * base `{nll, ci95}` or null, floor in nats or null.
 */
export class Curve {
  constructor({ runs, measure, signal }) {
    Object.assign(this, { runs, measure });
    this.holder = h("div", { class: "plot" });
    this.readout = h("output", { class: "readout" });
    this.slider = h("div", { class: "plot-slider", role: "slider", tabindex: 0, "aria-label": "Step of the chart" }, this.holder);
    this.slider.addEventListener("keydown", (event) => this.pressed(event));
    this.element = h("div", {}, this.slider, h("div", { class: "under-plot" }, this.legend(), this.readout));
    this.at = null;
    const redraw = () => this.draw();
    addEventListener("likely:theme", redraw, { signal });
    const watcher = new ResizeObserver(() => this.fit());
    watcher.observe(this.holder);
    signal.addEventListener("abort", () => {
      watcher.disconnect();
      this.plot?.destroy();
    });
  }

  /** Draw anew: another measure, another theme, or another number of runs. */
  draw() {
    if (!this.holder.isConnected) return;
    this.plot?.destroy();
    this.colours = Object.fromEntries(COLOURS.map((name) => [name, colourOf(`--${name}`)]));
    const { series, bands } = this.parts();
    const rule = { stroke: this.colours.line, width: 1 };
    const axis = { stroke: this.colours.dim, grid: rule, ticks: rule, font: FONT, labelFont: FONT };
    const read = ({ cursor }) => Number.isInteger(cursor.idx) && this.read(cursor.idx);
    this.plot = new uPlot(
      {
        width: this.holder.clientWidth,
        height: HEIGHT,
        legend: { show: false },
        scales: { x: { time: false }, y: { range: (_, low, high) => this.range(low, high) } },
        axes: [{ ...axis, label: "step", labelSize: 16, size: 32, incrs: WHOLE }, { ...axis, size: 62 }],
        series: [{}, ...series],
        bands,
        hooks: { draw: [(plot) => this.drawLevels(plot)], setCursor: [read] },
      },
      this.data(),
      this.holder,
    );
    this.describe();
  }

  fit() {
    const width = this.holder.clientWidth;
    if (!this.plot) this.draw();
    else if (width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  /** More was logged. */
  update() {
    this.plot?.setData(this.data());
    this.describe();
  }

  parts() {
    const series = [];
    const bands = [];
    this.runs.forEach((_, r) => {
      const dash = r ? [7, 4] : undefined;
      const { ink, dim, after, paper } = this.colours;
      series.push({ stroke: dim, width: 0.6, alpha: 0.55, points: { show: false } });
      series.push({ stroke: ink, width: 1.8, dash, points: { show: false } });
      if (this.measure !== "nll") return;
      const first = series.length + 1;
      const points = { show: true, size: 8, stroke: after, fill: r ? paper : after };
      series.push({ stroke: after, width: 2, dash, spanGaps: true, points });
      for (let i = 0; i < 2; i += 1) series.push({ stroke: "transparent", spanGaps: true, points: { show: false } });
      bands.push({ series: [first + 2, first + 1], fill: this.colours["after-band"] });
    });
    return { series, bands };
  }

  data() {
    const tables = [];
    for (const run of this.runs) {
      const { step } = run.steps;
      const value = MEASURES[this.measure][1];
      const raw = step.map((_, i) => finite(value(run.steps, i)));
      tables.push([step, raw, smooth(raw)]);
      if (this.measure !== "nll") continue;
      const points = heldOut(run);
      tables.push([points.map((e) => e.step), points.map((e) => e.nll), points.map((e) => e.low), points.map((e) => e.high)]);
    }
    return uPlot.join(tables.map((table) => (table[0].length ? table : [[0], ...table.slice(1).map(() => [null])])));
  }

  /** The base model's score is a mark to beat, and the entropy of the data one that can't be passed. */
  range(low, high) {
    const levels = this.measure === "nll" ? this.runs.flatMap((run) => [run.base?.nll, run.floor]).filter(Number.isFinite) : [];
    const [least, most] = [Math.min(low ?? 0, ...levels), Math.max(high ?? 1, ...levels)];
    const room = (most - least || Math.abs(most) || 1) * 0.08;
    return [least >= 0 ? Math.max(0, least - room) : least - room, most + room];
  }

  drawLevels({ ctx, bbox, valToPos }) {
    if (this.measure !== "nll") return;
    const levels = [
      ...this.runs.slice(0, 1).map((run) => [run.base?.nll, this.colours.before, [10, 5], "base model"]),
      ...this.runs.slice(0, 1).map((run) => [run.floor, this.colours.dim, [2, 4], "entropy floor"]),
    ].filter(([value]) => Number.isFinite(value));
    const scale = devicePixelRatio;
    ctx.save();
    ctx.font = FONT.replace("12", String(12 * scale));
    ctx.textAlign = "right";
    ctx.textBaseline = "bottom";
    for (const [value, colour, dash, words] of levels) {
      const y = valToPos(value, "y", true);
      ctx.strokeStyle = ctx.fillStyle = colour;
      ctx.lineWidth = 1.5 * scale;
      ctx.setLineDash(dash.map((length) => length * scale));
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.fillText(`${words} ${number(value)}`, bbox.left + bbox.width - 6 * scale, y - 3 * scale);
    }
    ctx.restore();
  }

  legend() {
    const entry = (name, words) => h("li", {}, h("span", { class: `key ${name}`, "aria-hidden": "true" }), words);
    const entries = [entry("key-raw", "each step"), entry("key-mean", "running mean")];
    if (this.measure === "nll") entries.push(entry("key-held-out", "held-out, with its 95% band"));
    if (this.runs.length > 1) entries.push(...this.runs.map((run, r) => entry(r ? "key-second" : "key-first", run.name)));
    return h("ul", { class: "legend" }, entries);
  }

  /** Arrow keys move through the steps, as on a slider. */
  pressed(event) {
    const last = this.plot.data[0].length - 1;
    const at = this.at ?? last;
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -last, End: last };
    if (steps[event.key] === undefined) return;
    event.preventDefault();
    const next = Math.min(Math.max(at + steps[event.key], 0), last);
    this.plot.setCursor({ left: this.plot.valToPos(this.plot.data[0][next], "x"), top: HEIGHT / 3 });
    this.read(next);
  }

  read(i) {
    this.at = i;
    const [, , digits] = MEASURES[this.measure];
    const perRun = this.measure === "nll" ? 5 : 2;
    const parts = this.runs.map((run, r) => {
      const [raw, , score] = this.plot.data.slice(1 + r * perRun).map((column) => column[i]);
      const told = [["this step", raw], ...(perRun === 5 ? [["held-out", score]] : [])];
      const known = told.filter(([, value]) => Number.isFinite(value));
      const words = known.map(([name, value]) => `${name} ${number(value, digits)}`).join(", ");
      return this.runs.length > 1 ? `${run.name}: ${words || "nothing"}` : words;
    });
    const words = `Step ${count(this.plot.data[0][i])}: ${parts.join("; ")}`;
    fill(this.readout, words);
    this.slider.setAttribute("aria-valuenow", this.plot.data[0][i]);
    this.slider.setAttribute("aria-valuetext", words);
  }

  describe() {
    if (!this.plot) return;
    const steps = this.plot.data[0];
    this.slider.setAttribute("aria-valuemin", steps[0] ?? 0);
    this.slider.setAttribute("aria-valuemax", steps.at(-1) ?? 0);
    if (this.at !== null) return;
    const words = `${MEASURES[this.measure][0]} over ${count(steps.at(-1) ?? 0)} steps. Arrow keys read it step by step.`;
    this.slider.setAttribute("aria-valuenow", steps.at(-1) ?? 0);
    this.slider.setAttribute("aria-valuetext", words);
  }

  /** The numbers as cells, with a header. */
  rows() {
    const header = ["run", "step", this.measure, "held_out_nll", "held_out_low", "held_out_high"];
    const value = MEASURES[this.measure][1];
    const cells = this.runs.flatMap((run) => [
      ...run.steps.step.map((step, i) => [run.name, step, value(run.steps, i), null, null, null]),
      ...(this.measure === "nll" ? heldOut(run).map((e) => [run.name, e.step, null, e.nll, e.low, e.high]) : []),
    ]);
    return [header, ...cells];
  }
}

/** Held-out scores in the order of their steps, with the base model's at step 0 where it is known. */
function heldOut(run) {
  const { base, evaluations } = run;
  const known = evaluations.some((evaluation) => evaluation.step === 0);
  const first = base && !known ? [{ step: 0, nll: base.nll, low: base.ci95?.[0] ?? null, high: base.ci95?.[1] ?? null }] : [];
  return [...first, ...evaluations].sort((a, b) => a.step - b.step);
}

const finite = (value) => (Number.isFinite(value) ? value : null);

/** Exponential running mean, without the pull to zero of its beginning. */
function smooth(values) {
  let [mean, weight] = [0, 0];
  return values.map((value) => {
    if (value === null) return weight ? mean / weight : null;
    mean = MEMORY * mean + (1 - MEMORY) * value;
    weight = MEMORY * weight + (1 - MEMORY);
    return mean / weight;
  });
}
