// How likely a token is, as a class of the style sheet, as a short text, and as words to be spoken.
// Each class has an underline of its own beside its colour, and the text has the sign: colour never says anything alone.

import { number, percent, signed } from "./format.js";

const CHANCES = [0.9, 0.5, 0.1, 0.01]; // lower bounds of the classes k0 to k3; k4 is below them all
const CHANGES = [0.1, 0.7, 2]; // nats; a factor of 1.1, 2 and 7.4 in the probability

/** The shade of a log-probability in nats; null where nothing predicts the token. */
export function ofChance(logprob) {
  if (logprob === null || logprob === undefined) return null;
  const chance = Math.exp(logprob);
  const step = CHANCES.findIndex((bound) => chance >= bound);
  return { name: `k${step === -1 ? CHANCES.length : step}`, text: percent(chance), words: `chance ${percent(chance)}` };
}

/** The shade of a change between two log-probabilities in nats. */
export function ofChange(before, after) {
  if (before === null || after === null || before === undefined || after === undefined) return null;
  const change = after - before;
  const step = CHANGES.filter((bound) => Math.abs(change) >= bound).length;
  if (step === 0) return { name: "same", text: signed(change, 2), words: "about as likely as before" };
  const better = change > 0;
  const words = `${number(Math.abs(change), 2)} nats ${better ? "more" : "less"} likely`;
  return { name: `${better ? "up" : "down"}${step}`, text: signed(change, 2), words };
}

/** What the classes mean, for a legend: [[class, words]]. */
export const LEGENDS = {
  chance: [["k0", "90% and more"], ["k1", "50 to 90%"], ["k2", "10 to 50%"], ["k3", "1 to 10%"], ["k4", "below 1%"]],
  change: [
    ["down3", "less likely, −2 or beyond"],
    ["down2", "−0.7 to −2"],
    ["down1", "−0.1 to −0.7"],
    ["same", "about the same"],
    ["up1", "+0.1 to +0.7"],
    ["up2", "+0.7 to +2"],
    ["up3", "more likely, +2 or beyond"],
  ],
};
