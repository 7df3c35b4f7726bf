// A prompt and a wanted answer under both models: how likely the answer is, what they say themselves, and what one
// training step on it would do.

import { aborted, get } from "../api.js";
import { fill, h } from "../dom.js";
import { number } from "../format.js";
import { term } from "../glossary.js";
import { button, failure, quiet, watch } from "../parts.js";
import { remember } from "../router.js";
import { LensView } from "../lens.js";
import { StepView } from "../step.js";
import { strip } from "../tokens.js";

const LONGEST = 512; // tokens of a generated answer
const LEARNING_RATE = "1e-5";

const LEAD =
  "Type a prompt and the answer you want. Both models are asked how likely it is, token by token, and what they would " +
  "say themselves.";

export async function tryPage({ view, parameters, query, signal }) {
  const run = await get(`/runs/${parameters.run}`, { signal });
  const page = new TryPage({ run, query, signal });
  fill(view, h("h1", {}, "Try it"), h("p", { class: "lead" }, LEAD), page.element);
  if (query.get("go") === "1") page.compare();
  else if (query.get("go") === "step") page.step();
  return "Try it";
}

class TryPage {
  constructor({ run, query, signal }) {
    Object.assign(this, { run, signal });
    this.prompt = h("textarea", { rows: 4, required: true, maxlength: 20000, dir: "auto" });
    this.answer = h("textarea", { rows: 4, maxlength: 20000, dir: "auto" });
    this.length = h("input", { type: "number", min: 1, max: LONGEST, value: query.get("length") ?? 64 });
    this.rate = h("input", { type: "text", inputmode: "decimal", value: query.get("rate") ?? LEARNING_RATE, size: 8 });
    this.prompt.value = query.get("prompt") ?? "";
    this.answer.value = query.get("answer") ?? "";
    this.status = h("div", {});
    this.results = { lens: h("div", {}), answers: h("div", {}), step: h("div", {}) };
    this.element = h("div", {}, this.form(), this.status, Object.values(this.results));
  }

  form() {
    const submit = (event) => {
      event.preventDefault();
      this.compare();
    };
    return h(
      "form",
      { class: "try", onsubmit: submit },
      h("label", {}, "Prompt", this.prompt),
      h("label", {}, "Wanted answer", this.answer),
      h(
        "div",
        { class: "controls" },
        h("button", { type: "submit", class: "main" }, "Compare before and after"),
        button("One step on this", () => this.step()),
        h("label", { class: "small" }, "Longest answer, tokens ", this.length),
        h("label", { class: "small" }, term("learning_rate", "Learning rate"), this.rate),
      ),
    );
  }

  /** The request that the form stands for, written into the address; null where there is nothing to ask. */
  asked(go) {
    const [prompt, answer] = [this.prompt.value, this.answer.value];
    const wanting = !prompt ? this.prompt : go === "step" && !answer ? this.answer : null;
    if (wanting) {
      fill(this.status, failure({ message: prompt ? "Type the answer that the step should teach." : "Type a prompt first." }));
      wanting.focus();
      return null;
    }
    const length = Math.min(Math.max(Math.round(Number(this.length.value)) || 64, 1), LONGEST);
    const unusual = (value, usual) => (String(value) === usual ? null : value);
    remember({ prompt, answer, length: unusual(length, "64"), rate: unusual(this.rate.value, LEARNING_RATE), go });
    return { run: this.run.id, prompt, answer, length, rate: Number(this.rate.value) };
  }

  async compare() {
    const asked = this.asked("1");
    if (!asked) return;
    const { run, prompt, answer, length } = asked;
    await this.working(async (ask) => {
      for (const holder of Object.values(this.results)) fill(holder);
      if (answer) {
        const found = await ask("The wanted answer", { kind: "lens", run, prompt, answer, rivals: 3 });
        const lens = new LensView({ found, signal: this.signal });
        fill(this.results.lens, lens.element);
      }
      fill(this.results.answers, ownAnswers(await ask("Their own answers", { kind: "generate", run, prompt, max_tokens: length })));
    });
  }

  async step() {
    const asked = this.asked("step");
    if (!asked) return;
    const { run, prompt, answer, rate } = asked;
    await this.working(async (ask) => {
      const request = { kind: "step", run, prompt, answer, rivals: 3, learning_rate: rate };
      const found = await ask("One step", request);
      fill(this.results.step, new StepView({ found, rate }).element);
    });
  }

  /** One thing at a time: what was under way is cancelled. */
  async working(act) {
    this.current?.abort();
    const current = new AbortController();
    this.current = current;
    const signal = AbortSignal.any([current.signal, this.signal]);
    try {
      await act((label, request) => watch(this.status, label, request, signal));
    } catch (error) {
      if (!signal.aborted) fill(this.status, aborted(error) ? quiet("Cancelled.") : failure(error));
    }
  }
}

/** answer: {text, stopped, tokens: [{text, logprob, rank}]}. */
function answerOf(model, { tokens, stopped }) {
  const mean = tokens.length ? -tokens.reduce((sum, { logprob }) => sum + logprob, 0) / tokens.length : null;
  const end = stopped ? "It ended by itself." : "It was cut off at the longest length allowed.";
  const text = tokens.length ? strip({ label: `Answer of the ${model}`, chances: tokens }) : h("p", {}, "(no text)");
  return h("div", { class: "answer" }, text, quiet(`${number(mean)} nats per token. ${end}`));
}

const ownAnswers = ({ base, tuned }) =>
  h(
    "section",
    {},
    h("h2", {}, "What they say themselves"),
    h(
      "div",
      { class: "columns" },
      base && h("div", {}, h("h3", {}, term("base", "Before")), answerOf("base model", base)),
      h("div", {}, h("h3", {}, term("tuned", "After")), answerOf("tuned model", tuned)),
    ),
  );
