// Light, dark, or as the system says.

import { select } from "./parts.js";

const KEY = "likely.theme";
const CHOICES = { system: "As the system", light: "Light", dark: "Dark" };

/** The switch. Pictures that can't follow by CSS listen to `likely:theme` on the window. */
export function themeSwitch() {
  const chosen = localStorage.getItem(KEY) ?? "system";
  const changed = () => dispatchEvent(new Event("likely:theme"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  const onChoose = (value) => {
    if (value === "system") {
      localStorage.removeItem(KEY);
      delete document.documentElement.dataset.theme;
    } else {
      localStorage.setItem(KEY, value);
      document.documentElement.dataset.theme = value;
    }
    changed();
  };
  return select(Object.entries(CHOICES), { class: "quiet", "aria-label": "Colours", chosen, onChoose });
}
