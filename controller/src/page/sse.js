// Hears the controller: its events as they come, or its status each second where there are no events; again and again
// when the connection is lost. Also sends commands.

const TOKEN = "tideshift-token";
/** Nothing heard for so long, though the controller says something each second: the connection is dead. */
const SILENCE = 6000;
const POLL = 1000;
/** There are no events here, or none for so many at a time. */
const NO_EVENTS = [404, 405, 406, 429, 501, 503];
const BACKOFF = [300, 600, 1200, 2500, 5000];
/** A status more than so many milliseconds off tells that the clocks differ; less, that the network is slow. */
const SKEW = 2000;

/** The user's token, kept for this tab only. */
export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => (value ? sessionStorage.setItem(TOKEN, value) : sessionStorage.removeItem(TOKEN)),
};

/** An answer other than a good one. */
export class Refusal extends Error {
  constructor(message, { status, headers }) {
    super(message);
    this.status = status;
    /** Whether another token would do. A 403 without a challenge is about something else, such as the page's host. */
    this.wantsToken = status === 401 || (status === 403 && headers.has("www-authenticate"));
  }
}

/** A call of the API; `body`, if any, goes as JSON. Fails with a `Refusal` that says what the API said. */
export async function call(path, { method = "GET", body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const init = { method, headers, cache: "no-store", redirect: "error", signal: signal ?? AbortSignal.timeout(10_000) };
  const response = await fetch(path, { ...init, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** A command to a rollout, such as `promote`. */
export function command(rollout, name, body) {
  return call(`v1/rollouts/${encodeURIComponent(rollout)}/${name}`, { method: "POST", body });
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let message = "";
  try {
    message = JSON.parse(text).error;
  } catch {
    // Not the API's own: a gateway's, say.
  }
  return new Refusal(message || `the controller answered with HTTP status ${response.status}`, response);
}

/** Splits a stream of text into server-sent events, whatever the pieces it comes in. */
export class Events {
  #rest = "";
  #event = "";
  #data = [];

  /** The events that `text` completes: `{event, data}`. */
  take(text) {
    const whole = this.#rest + text;
    // A carriage return at the end may be half of a line's end.
    const end = whole.endsWith("\r") ? whole.length - 1 : whole.length;
    const lines = whole.slice(0, end).split(/\r\n|\r|\n/);
    this.#rest = lines.pop() + whole.slice(end);
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
        [this.#event, this.#data] = ["", []];
        continue;
      }
      const [, field, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
      if (field === "event") this.#event = value ?? "";
      else if (field === "data") this.#data.push(value ?? "");
    }
    return events;
  }
}

/**
 * The connection. Calls `onStatus(status)`, `onTransition(transition)`, and `onChange()` when `state` changes: `connecting`,
 * `live`, `lost`, `denied` (another token would do) or `refused` (none would).
 */
export class Feed {
  state = "connecting";
  /** Why it is lost, denied or refused. */
  reason = "";
  /** When the controller was last heard, in milliseconds; 0: never. */
  heard = 0;
  /** How far the controller's clock is ahead of ours, in milliseconds. */
  skew = 0;
  #abort = new AbortController();
  #wake = () => {};
  #failures = 0;
  #isNew = false;

  constructor({ onStatus, onTransition, onChange }) {
    Object.assign(this, { onStatus, onTransition, onChange });
    addEventListener("online", () => this.#wake());
    document.addEventListener("visibilitychange", () => document.hidden || this.#wake());
  }

  /** The controller's time in milliseconds. */
  now() {
    return Date.now() + this.skew;
  }

  /** Reconnects with the current token. */
  again() {
    this.#failures = 0;
    this.#isNew = true;
    this.#abort.abort();
    this.#wake();
  }

  /** Hears for ever. */
  async run() {
    for (;;) {
      this.#abort = new AbortController();
      this.#isNew = false;
      try {
        await this.#listen(this.#abort.signal);
        throw new Error("the controller ended the connection");
      } catch (error) {
        if (this.#isNew) continue;
        const refused = error.status === 403 ? "refused" : "lost";
        this.#change(error.wantsToken ? "denied" : refused, error.message);
      }
      await this.#pause();
    }
  }

  #change(state, reason = "") {
    const changed = this.state !== state || this.reason !== reason;
    [this.state, this.reason] = [state, reason];
    if (changed) this.onChange();
  }

  async #pause() {
    const base = BACKOFF[Math.min(this.#failures++, BACKOFF.length - 1)];
    const length = this.state === "denied" ? 30_000 : base * (0.75 + Math.random() / 2);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, length);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.#wake = () => {};
  }

  async #listen(signal) {
    const headers = { accept: "text/event-stream" };
    if (token.get()) headers.authorization = `Bearer ${token.get()}`;
    const silence = this.#watch();
    try {
      const response = await fetch("v1/events", { headers, cache: "no-store", redirect: "error", signal });
      this.#look(response);
      if (NO_EVENTS.includes(response.status)) return await this.#poll(signal, silence);
      if (!response.ok) throw await refusal(response);
      const events = new Events();
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        silence.put_off();
        for (const { event, data } of events.take(value)) {
          if (event === "status") this.#take(JSON.parse(data));
          else if (event === "transition") this.onTransition(JSON.parse(data));
        }
      }
    } finally {
      silence.end();
    }
  }

  async #poll(signal, silence) {
    for (;;) {
      const response = await fetch("v1/status", { headers: this.#authorization(), cache: "no-store", signal });
      if (!response.ok) throw await refusal(response);
      this.#look(response);
      silence.put_off();
      this.#take(await response.json());
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
  }

  #authorization() {
    return token.get() ? { authorization: `Bearer ${token.get()}` } : {};
  }

  #take(status) {
    this.heard = Date.now();
    this.#failures = 0;
    this.#change("live");
    this.onStatus(status);
  }

  #look(response) {
    const date = Date.parse(response.headers.get("date") ?? "");
    const skew = date - Date.now();
    this.skew = Math.abs(skew) > SKEW ? skew : 0;
  }

  #watch() {
    const abort = this.#abort;
    let timer;
    const put_off = () => {
      clearTimeout(timer);
      timer = setTimeout(() => abort.abort(new Error("the controller is silent")), SILENCE);
    };
    put_off();
    return { put_off, end: () => clearTimeout(timer) };
  }
}
