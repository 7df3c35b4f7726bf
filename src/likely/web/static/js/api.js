// What the server is asked. Every failure becomes one sentence that can be shown as it is.

const SIGNED_OUT = "This browser is not signed in. Open the address that `likely view` printed.";
const POLL = 250; // milliseconds between looks at a job

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** JSON of a GET. An aborted signal rejects with an AbortError, which nobody needs to be told. */
export const get = (path, { query = {}, signal } = {}) => ask("GET", link(path, query), { signal });

const post = (path, body, { signal } = {}) => ask("POST", link(path), { body, signal });

export const remove = (path) => ask("DELETE", link(path), { keepalive: true });

/** The address of something that the server gives, for links and streams. */
export function link(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given).toString();
  return `/api${path}${text ? `?${text}` : ""}`;
}

async function ask(method, address, { body, signal, keepalive } = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(address, { method, headers, signal, keepalive, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The viewer's server does not answer. Is `likely view` still running?", 0);
  }
  if (response.status === 401) throw new ApiError(SIGNED_OUT, 401);
  const answer = await response.json().catch(() => null);
  signal?.throwIfAborted();
  if (!response.ok) throw new ApiError(answer?.error ?? `The server answered ${response.status}.`, response.status);
  return answer;
}

export const aborted = (error) => error.name === "AbortError";

export const wait = (milliseconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

/** Follow a job of the server to its result. `progress` is told of the job at every look. */
async function follow(id, { signal, progress = () => {} }) {
  for (;;) {
    const job = await get(`/jobs/${id}`, { signal });
    progress(job);
    if (job.state === "done") return job.result;
    if (job.state === "failed") throw new ApiError(job.error ?? "The work failed.", 500);
    if (job.state === "cancelled") throw new ApiError("Cancelled.", 499);
    await wait(POLL, signal);
  }
}

/** Have a job done: a request, or the id of a job. If `cancel` ends first, it is cancelled at the server too. */
export async function work(asked, { signal, cancel, progress }) {
  const job = typeof asked === "string" ? asked : (await post("/jobs", asked)).job;
  const stop = () => remove(`/jobs/${job}`).catch(() => {});
  if (cancel.aborted) stop();
  else cancel.addEventListener("abort", stop);
  try {
    return await follow(job, { signal, progress });
  } finally {
    cancel.removeEventListener("abort", stop);
  }
}

/** The latest job of a kind about a run that is in one of some states, or undefined. */
export async function jobOf(run, kind, states, signal) {
  const { jobs } = await get("/jobs", { signal });
  return jobs.findLast((job) => job.run === run && job.kind === kind && states.includes(job.state))?.id;
}
