// Numbers and texts as people read them. What is not known is a dash.

const NONE = "–";
const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

const known = (value) => typeof value === "number" && Number.isFinite(value);
export const count = (value) => (known(value) ? COUNT.format(value) : NONE);
export const interval = (ends, one) => (Array.isArray(ends) ? ends.map(one).join(" to ") : NONE);
export const number = (value, digits = 3) => (known(value) ? minus(value.toFixed(digits)) : NONE);

/** A change, with its sign; a true minus is as wide as a plus. */
export function signed(value, digits = 3) {
  if (!known(value)) return NONE;
  const text = value.toFixed(digits);
  return Number(text) > 0 ? `+${text}` : minus(text);
}

const minus = (text) => (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−"));

/** A probability or a share; small ones keep a figure that says something. */
export function percent(share) {
  if (!known(share)) return NONE;
  const hundred = share * 100;
  if (hundred === 0) return "0%";
  if (hundred < 0.01) return "<0.01%";
  if (hundred > 99.99 && hundred < 100) return ">99.99%";
  const digits = hundred < 0.1 || (hundred > 99.9 && hundred < 100) ? 2 : hundred < 10 || hundred > 99 ? 1 : 0;
  return `${hundred.toFixed(hundred === 100 ? 0 : digits)}%`;
}

/** A duration in the two units that matter. */
export function duration(seconds) {
  const whole = known(seconds) ? Math.max(0, Math.round(seconds)) : null;
  if (whole === null || whole < 60) return whole === null ? NONE : `${whole} s`;
  const [big, small, size] = whole < 3600 ? ["min", "s", 60] : whole < 86400 ? ["h", "min", 3600] : ["d", "h", 86400];
  const rest = Math.floor((whole % size) / { min: 1, h: 60, d: 3600 }[big]);
  return `${Math.floor(whole / size)} ${big} ${rest} ${small}`;
}

/** How many of what: `1 example`, `2 examples`. */
export const many = (value, one, more = `${one}s`) => `${count(value)} ${value === 1 ? one : more}`;

/** Round numbers between two, about five of them, to mark an axis at. */
export function ticks(low, high) {
  const rough = (high - low) / 5 || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * unit).find((each) => each >= rough * 0.999);
  const [first, last] = [Math.ceil(low / step - 1e-6), Math.floor(high / step + 1e-6)];
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** The beginning of a long text, cut between characters. */
export function shortened(text, length) {
  const characters = Array.from(String(text));
  return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : String(text);
}

// Letters that steer, reorder or hide text, or that no font draws: they are shown by their numbers.
// (Cc but for line breaks and tabs, Cf, Zl, Zp, and what Unicode says is drawn as nothing. Joiners shape letters of many
// languages and emoji, and can neither steer nor hide; so can't variation selectors.)
const UNSEEN = /(?!\n|\t|\u200c|\u200d|\ufe0e|\ufe0f)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu;
const NAMES = { "\n": "↵", "\t": "⇥", "\r": "␍" };

const written = (letter) => {
  const code = letter.codePointAt(0);
  if (code < 0x20) return NAMES[letter] ?? String.fromCodePoint(0x2400 + code);
  return `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
};

/** A text in which nothing is invisible and nothing can steer its surroundings; line breaks and tabs as they are. */
export const harmless = (text) => String(text).replace(UNSEEN, written);

/** A token's text with all its white space marked. */
export function visible(text) {
  if (text === "") return "(nothing)";
  const marked = harmless(text).replace(/[\n\t\r]/g, written);
  return /^ +$/.test(marked) ? "␣".repeat(marked.length) : marked.replace(/ {2,}/g, (run) => "␣".repeat(run.length));
}

/** A token as it is spoken: white space by its name. */
export function spoken(text) {
  if (text === "") return "no text";
  if (/^ +$/.test(text)) return text.length === 1 ? "space" : `${text.length} spaces`;
  if (/^\n+$/.test(text)) return text.length === 1 ? "line break" : `${text.length} line breaks`;
  if (/^\t+$/.test(text)) return text.length === 1 ? "tab" : `${text.length} tabs`;
  return visible(text);
}
