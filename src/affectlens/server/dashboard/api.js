// The HTTP interface, and nothing else: the key, errors in words, streams, whether the server can be reached.

const STORED = "affectlens-key";
let key = sessionStorage.getItem(STORED) ?? "";
let asking = null,
  ask = () => Promise.reject(new Error("no prompt for the key"));
let reached = true;
const watchers = new Set();

/** An answer of the server that is no success, in its own words. */
export class ServerError extends Error {
  constructor(status, { message, type, param, code } = {}, retry = null) {
    super(message || `the server answered ${status}`);
    Object.assign(this, { status, type, param, code, retry });
    this.title =
      { 401: "An API key is needed", 404: "There is no such thing here", 429: "The server is busy" }[status] ??
      (status >= 500 ? "The server failed" : "The server refused this");
  }
}

/** No answer at all. */
export class Offline extends Error {
  constructor() {
    super("The server does not answer. It may have been stopped, or the network is down.");
    this.title = "Offline";
  }
}

/** `prompt(refused)` asks the user for a key and gives a promise of it. */
export const onKey = (prompt) => {
  ask = prompt;
};
export const hasKey = () => key !== "";
export function forgetKey() {
  key = "";
  sessionStorage.removeItem(STORED);
}

/** `watcher(reached)` is told when the server stops answering, and when it answers again. */
export const onReach = (watcher) => {
  watchers.add(watcher);
};
function reach(now) {
  if (now === reached) return;
  reached = now;
  watchers.forEach((watcher) => watcher(now));
}

function wantKey() {
  asking ??= ask(key !== "")
    .then((given) => {
      key = given;
      sessionStorage.setItem(STORED, key);
    })
    .finally(() => {
      asking = null;
    });
  return asking;
}

async function call(path, { method = "GET", body, signal } = {}) {
  for (;;) {
    const used = key;
    const headers = {
      ...(used && { Authorization: `Bearer ${used}` }),
      ...(body !== undefined && { "Content-Type": "application/json" }),
    };
    let response;
    try {
      response = await fetch(path, {
        method,
        headers,
        signal,
        body: body === undefined ? undefined : JSON.stringify(body),
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      reach(false);
      throw new Offline();
    }
    reach(true);
    if (response.status === 401) {
      if (used === key) await wantKey(); // or somebody has given one meanwhile
      continue;
    }
    if (!response.ok) {
      const answer = await response.json().catch(() => ({}));
      throw new ServerError(response.status, answer.error, Number(response.headers.get("Retry-After")) || null);
    }
    return response;
  }
}

/** The JSON of an answer. */
export const get = async (path, options) => (await call(path, options)).json();
export const post = async (path, body = {}, options = {}) => (await call(path, { ...options, method: "POST", body })).json();
export const remove = async (path) => {
  await call(path, { method: "DELETE" });
};

/** A path with a query; what is empty is left out. */
export function query(path, values) {
  const kept = Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return kept.length ? `${path}?${new URLSearchParams(kept)}` : path;
}

/** Server-sent events of a response: {event, data}. */
async function* sent(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const parts = rest.split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        let event = "message";
        const data = [];
        for (const line of part.split(/\r?\n/)) {
          if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
          else if (line.startsWith("event:")) event = line.slice(6).trim();
        }
        yield { event, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The chunks of a reply that is being generated, until [DONE]; an error that comes in the middle is thrown. */
export async function* chunks(path, body, signal) {
  const response = await call(path, { method: "POST", body, signal });
  for await (const { data } of sent(response)) {
    if (data === "[DONE]") return;
    if (!data) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(response.status, chunk.error);
    yield chunk;
  }
  throw new ServerError(0, { message: "The stream ended before the reply did: the server may have been stopped." });
}

/** What happens on the server, for as long as the page is open; it connects again by itself. */
export async function follow(handler) {
  for (let wait = 1; ; wait = Math.min(15, wait * 2)) {
    const silence = new AbortController();
    let timer;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), 45000); // three heartbeats
    };
    try {
      heard();
      const response = await call("/v1/events", { signal: silence.signal });
      handler("open", {});
      wait = 1;
      for await (const { event, data } of sent(response)) {
        heard();
        if (data) handler(event, JSON.parse(data));
      }
    } catch (error) {
      if (error.status === 404) return;
    } finally {
      clearTimeout(timer);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  }
}

/** Save an answer as a file. A plain link would do without a key; links cannot carry one. */
export async function download(path, name) {
  const blob = await (await call(path)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
