// Starts the page: one feed, one record, and the view that the address names.

import { each, make, say, set, show } from "./dom.js";
import { Feed } from "./sse.js";
import { Record } from "./history.js";
import { isBehind, overview, proxies } from "./overview.js";
import { rolloutView, rollouts } from "./rollout.js";
import { askToken } from "./commands.js";
import * as words from "./format.js";

const TRANSITIONS = 500;
/** Nothing heard for so long: what is shown is called old. */
const OLD = 3000;

const at = (id) => document.getElementById(id);

const app = {
  status: null,
  record: new Record(),
  /** How far back the plots reach. */
  seconds: 300,
  /** Counts the connections, so that what was missed between two can be asked for. */
  connected: 0,
  announce: (text) => say(at("live"), text),
  /** Calls `listener` at each update, until the function that it returns is called. */
  onRender: (listener) => {
    listeners.add(listener);
    return () => listeners.delete(listener);
  },
  transitions: (name) => past.get(name)?.toReversed() ?? [],
  /** Takes in what the controller says that a rollout has come through, the newest last. */
  remember: (name, history) => keep(name, [...history, ...(past.get(name) ?? [])]),
  render,
};
const listeners = new Set();
/** The transitions that are known of each rollout, the newest last. */
const past = new Map();
let view = null;
let shown = null;
let due = false;
let before = new Map();

app.feed = new Feed({
  onStatus: (status) => {
    app.status = status;
    app.record.take(status, Date.now());
    tellChanges(status);
    soon();
  },
  onTransition: ({ name, ...transition }) => {
    keep(name, [...(past.get(name) ?? []), transition]);
  },
  onChange: () => {
    if (app.feed.state === "live" && ++app.connected > 1) app.record.anew();
    if (app.feed.state === "lost" && app.status) app.announce("Connection to the controller lost.");
    if (app.feed.state === "live" && app.connected > 1) app.announce("Connected again.");
    soon();
  },
});

/** Keeps transitions of a rollout, each once; those of the same millisecond in the order that they come in. */
function keep(name, transitions) {
  const all = new Map();
  for (const one of transitions) {
    const key = [one.time, one.rollout, one.phase, one.reason, one.step, one.message].join("\n");
    if (!all.has(key)) all.set(key, { ...one, key });
  }
  const time = ({ time }) => Date.parse(time) || 0;
  past.set(name, [...all.values()].sort((a, b) => time(a) - time(b)).slice(-TRANSITIONS));
  soon();
}

/** Says changes of phase to those who do not see them. */
function tellChanges(status) {
  const now = new Map(rollouts(status).map(({ name, phase, message }) => [name, { phase, message }]));
  const changed = [...now].filter(([name, { phase }]) => before.has(name) && before.get(name).phase !== phase);
  before = now;
  if (changed.length) app.announce(changed.slice(0, 3).map(([name, { phase, message }]) => `${name}: ${phase}. ${message}`).join(" "));
}

/** Updates at most once per frame, and not while the page is hidden. */
function soon() {
  if (due || document.hidden) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    render();
  });
}

function route() {
  const [, kind, name] = /^#\/(\w*)\/?(.*)$/.exec(location.hash) ?? [];
  try {
    if (kind === "rollout" && name) return { kind, name: decodeURIComponent(name) };
  } catch {
    // Not an address of ours.
  }
  return { kind: kind === "proxies" ? kind : "rollouts" };
}

function render() {
  renderConnection();
  renderProblems();
  if (!app.status) return renderMain("wait", () => waiting());
  const all = rollouts(app.status);
  let { kind, name } = route();
  if (kind === "rollouts" && all.length === 1) [kind, name] = ["rollout", all[0].name];
  if (kind === "rollout" && !all.some((one) => one.name === name)) kind = "missing";
  const views = { missing, proxies, rollouts: overview, rollout: () => rolloutView(name, app) };
  renderMain(`${kind} ${name ?? ""}`, () => views[kind](app));
  set(at("to-proxies"), "aria-current", kind === "proxies" ? "page" : null);
  set(at("to-rollouts"), "aria-current", kind === "proxies" ? null : "page");
  const behind = app.status.proxies.filter((proxy) => isBehind(proxy, app.status)).length;
  say(at("to-rollouts"), `Rollouts ${words.count(all.length)}`);
  say(at("to-proxies"), `Proxies ${words.count(app.status.proxies.length)}${behind ? `, ${words.count(behind)} behind` : ""}`);
  for (const listener of listeners) listener();
}

function renderMain(key, create) {
  if (shown !== key) {
    view?.end?.();
    view = create();
    const was = shown;
    shown = key;
    at("main").replaceChildren(view.element);
    // The words of a new page are read from its heading; the first one is not jumped to.
    if (was !== null && !was.startsWith("wait")) {
      scrollTo(0, 0);
      view.heading?.focus({ preventScroll: true });
    }
  }
  view.update();
  const title = `${view.title()} – Tideshift`;
  if (document.title !== title) document.title = title;
}

function missing() {
  const link = make("a", { href: "#/" }, "All rollouts");
  const text = make("p", {}, "There is no rollout of this name. ", link);
  return { element: make("div", { class: "empty" }, make("h1", { tabindex: -1 }, "Not found"), text), update: () => {}, title: () => "Not found" };
}

function waiting() {
  const text = make("p");
  const enter = make("button", { type: "button", class: "solid", onclick: () => askToken(app) }, "Enter a token");
  const update = () => {
    const { state, reason } = app.feed;
    show(enter, state === "denied");
    if (state === "denied") say(text, `The controller wants a token: ${reason}`);
    else if (state === "refused") say(text, `The controller refuses: ${reason}`);
    else say(text, state === "lost" ? "The controller cannot be reached; trying again." : "Connecting to the controller.");
  };
  return { element: make("div", { class: "empty" }, text, enter), update, title: () => "Connecting" };
}

function renderConnection() {
  const { state, heard } = app.feed;
  const old = state !== "live" || Date.now() - heard > OLD;
  const refused = state === "denied" || state === "refused";
  document.body.dataset.state = app.status && old && !refused ? "lost" : state;
  set(at("connection"), "title", app.feed.reason || null);
  const silence = heard ? `last heard ${words.span((Date.now() - heard) / 1000)} ago` : "never heard";
  if (state === "denied") say(at("heard"), "a token is needed");
  else if (state === "refused") say(at("heard"), "refused by the controller");
  else if (!heard && state === "connecting") say(at("heard"), "connecting");
  else if (old) say(at("heard"), `connection lost, ${silence}`);
  else say(at("heard"), `live, revision ${app.status.revision}`);
}

function renderProblems() {
  const problems = (app.status?.documentErrors ?? []).map((error) => `Not in force: ${error}`);
  if (app.status?.stateError) problems.unshift(`Not safe from a restart: ${app.status.stateError}`);
  show(at("problems"), problems.length);
  each(at("problems"), problems.slice(0, 20), (text) => text, (text) => ({ element: make("p", {}, text), update: () => {} }));
}

at("token").addEventListener("click", () => askToken(app));
addEventListener("hashchange", render);
document.addEventListener("visibilitychange", soon);
// The skip link does not change the address, which names the view.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  at("main").focus();
});
// Relative times go on also when nothing is heard.
setInterval(soon, 1000);
app.feed.run();
