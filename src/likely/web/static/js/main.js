// The frame around the pages: navigation, titles, and what is shown when a page can't be.

import { aborted, ApiError, get } from "./api.js";
import { announce, fill, h } from "./dom.js";
import { harmless } from "./format.js";
import { startTips } from "./glossary.js";
import { dataPage } from "./pages/data.js";
import { examplePage } from "./pages/example.js";
import { examplesPage, runExamplesPage } from "./pages/examples.js";
import { runPage } from "./pages/run.js";
import { runsPage } from "./pages/runs.js";
import { tryPage } from "./pages/try.js";
import { failure, notice, select } from "./parts.js";
import { address, navigate, start } from "./router.js";
import { themeSwitch } from "./theme.js";

const main = document.getElementById("main");

const ROUTES = [
  ["/", runsPage],
  ["/run/:run", runPage],
  ["/run/:run/examples", runExamplesPage],
  ["/run/:run/try", tryPage],
  ["/run/:run/data", dataPage],
  ["/scores/:set", examplesPage],
  ["/scores/:set/:row", examplePage],
];

const PAGES = [
  ["Run", "", runPage],
  ["Examples", "/examples", runExamplesPage],
  ["Try it", "/try", tryPage],
  ["Data", "/data", dataPage],
];

async function show({ page, parameters, path, query, signal, moved }) {
  run = parameters.run ?? query.get("run");
  document.getElementById("broken").hidden = true;
  drawNavigation(page);
  const view = h("div", { class: "page" });
  fill(main, view);
  try {
    if (!page) throw new ApiError(`There is no page ${path} here.`, 404);
    const title = await page({ view, parameters, query, signal, run });
    if (signal.aborted) return;
    document.title = `${title} · likely`;
    view.dataset.drawn = "";
    if (moved) {
      main.focus({ preventScroll: true });
      scrollTo(0, 0);
      announce(title);
    }
  } catch (error) {
    if (aborted(error) || signal.aborted) return;
    document.title = "likely";
    view.dataset.drawn = "";
    const known = error instanceof ApiError;
    const way = error.status === 401 ? null : notice("", h("a", { href: "#/" }, "All runs"));
    fill(view, h("h1", {}, "This can't be shown"), known && failure(error), way);
    if (!known) throw error; // which is told above the page
  }
}

let run = null; // that the page is about

function drawNavigation(page) {
  const here = page === examplePage || page === examplesPage ? runExamplesPage : page;
  const links = run
    ? PAGES.map(([words, end, own]) => h("a", { href: address(`/run/${run}${end}`), "aria-current": own === here ? "page" : null }, words))
    : [h("a", { href: "#/", "aria-current": page === runsPage ? "page" : null }, "Runs")];
  fill(document.getElementById("pages"), links);
  const picker = document.getElementById("picker");
  if (picker) picker.value = run ?? "";
}

/** With several runs, one can be chosen from every page. */
async function drawSwitches() {
  const holder = document.getElementById("switches");
  fill(holder, themeSwitch());
  const { runs } = await get("/runs").catch(() => ({ runs: [] }));
  if (runs.length < 2) return;
  const onChoose = (id) => navigate(id ? `/run/${id}` : "/");
  const options = [["", "All runs"], ...runs.map(({ id, name }) => [id, harmless(name)])];
  holder.prepend(select(options, { id: "picker", class: "quiet", "aria-label": "Run", chosen: run, onChoose }));
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
startTips();
start(ROUTES, show);
drawSwitches();
