// The server, as this page talks to it.

const KEY = "offramp-key";

/** A failure as a sentence for the person, with the server's code where there is one. */
export class Failure extends Error {
  constructor(sentence, code, status) {
    super(sentence);
    this.code = code;
    this.needsKey = status === 401 || status === 403;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?", "unreachable");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  return new Failure(sentence(body), body.code, response.status);
}

function sentence(body) {
  const said = body.error || "the server failed";
  return `${said[0].toUpperCase()}${said.slice(1)}.`;
}

export async function getJson(path) {
  return (await send(path)).json();
}

export async function getText(path) {
  return (await send(path)).text();
}

/** Classify an image; `onExit` is called with each exit as it is passed. Gives the answer. */
export async function classify(image, parameters, onExit, signal) {
  const headers = { Accept: "text/event-stream", "Content-Type": "application/octet-stream" };
  const path = `classify?${new URLSearchParams(parameters)}`;
  const response = await send(path, { method: "POST", body: image, headers, signal });
  for await (const [name, data] of events(response.body)) {
    if (name === "exit") onExit(data);
    if (name === "answer") return data;
    if (name === "error") throw new Failure(sentence(data), data.code);
  }
  throw new Failure("The server ended before its answer.", "cut_off");
}

/** The events of a stream, as [name, data]. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      yield [fields.event, JSON.parse(fields.data)];
    }
  }
}
