// Addresses and pages. A page's whole state is the path and query behind the #, so that it can be shared and reopened.

let current = null;

/** The path and query of the page that is shown. */
export function place() {
  const [path, query = ""] = (location.hash.slice(1) || "/").split(/\?(.*)/s);
  return { path, query: new URLSearchParams(query) };
}

/** The address of a page of this server; parts that are null or empty are left out of its query. */
export function address(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return `#${path}${text ? `?${text}` : ""}`;
}

export function navigate(path, query = {}) {
  location.hash = address(path, query);
}

/** Write a part of a page's state into its address; null takes a name out. The page draws the change itself. */
export function remember(changes, { push = false } = {}) {
  const { path, query } = place();
  const whole = address(path, { ...Object.fromEntries(query), ...changes });
  if (whole !== location.hash) history[push ? "pushState" : "replaceState"](null, "", whole);
}

/**
 * Show the page of the address, now and at every change of it.
 *
 * routes: [[pattern, page]], where a pattern is a path whose parts may be `:names`. `show` gets
 * `{page, parameters, path, query, signal, moved}`: the signal ends when the page is left, `moved` says whether another
 * page was shown before.
 */
export function start(routes, show) {
  const table = routes.map(([pattern, page]) => [new RegExp(`^${pattern.replace(/:(\w+)/g, "(?<$1>[0-9a-z-]+)")}$`), page]);
  let shown = false;
  const follow = () => {
    const { path, query } = place();
    if (location.hash && !path.startsWith("/")) return;
    current?.abort();
    current = new AbortController();
    const matches = table.map(([pattern, page]) => [pattern.exec(path), page]);
    const [match, page] = matches.find(([found]) => found) ?? [null, null];
    show({ page, parameters: match?.groups ?? {}, path, query, signal: current.signal, moved: shown });
    shown = true;
  };
  addEventListener("hashchange", follow);
  follow();
}
