// The metrics of a run, kept up to date while it is being written.

import { get, link } from "./api.js";

/** A run's metrics as the server gives them, and what is new of them. */
export class Live {
  /** onMetrics(metrics): there is more. onState(entry): the run's state, step or verdict changed. */
  constructor(run, { signal, onMetrics = () => {}, onState = () => {} }) {
    Object.assign(this, { run, signal, onMetrics, onState, metrics: null, source: null });
    signal.addEventListener("abort", () => this.source?.close());
  }

  /** The snapshot. */
  async open() {
    this.metrics = await get(`/runs/${this.run}/metrics`, { signal: this.signal });
  }

  /** The stream of what comes after the snapshot. */
  listen() {
    this.source?.close();
    if (this.signal.aborted) return;
    const { generation, lines } = this.metrics;
    this.source = new EventSource(link(`/runs/${this.run}/live`, { generation, lines }));
    const on = (name, act) => this.source.addEventListener(name, (event) => !this.signal.aborted && act(JSON.parse(event.data)));
    on("metrics", (more) => this.take(more));
    on("state", (entry) => this.onState(entry));
    on("reset", () => this.again());
  }

  /** The file was cut back or replaced: what was read is no longer true. */
  async again() {
    this.source.close();
    await this.open().then(() => (this.listen(), this.onMetrics(this.metrics)), () => {});
  }

  take(more) {
    // A stream that was cut begins again where its address says: lines that are here already are left out.
    if (more.generation !== this.metrics.generation) return void this.again();
    const last = this.metrics.steps.step.at(-1) ?? -Infinity;
    const fresh = more.steps.step.map((step, i) => [step, i]).filter(([step]) => step > last);
    for (const [name, column] of Object.entries(this.metrics.steps)) column.push(...fresh.map(([, i]) => more.steps[name][i]));
    for (const name of ["evaluations", "skipped"]) {
      const seen = new Set(this.metrics[name].map(({ step }) => step));
      this.metrics[name].push(...more[name].filter(({ step }) => !seen.has(step)));
    }
    Object.assign(this.metrics, { pace: more.pace ?? this.metrics.pace, lines: more.lines ?? this.metrics.lines });
    this.onMetrics(this.metrics);
  }
}
