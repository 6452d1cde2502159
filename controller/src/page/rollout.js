// One rollout: where it stands and why, its steps, each service's versions, verdict and plots, and what happened.

import { chip, colour, each, make, say, set, show, style } from "./dom.js";
import { plots } from "./plots.js";
import { toolbar } from "./commands.js";
import { call } from "./sse.js";
import * as words from "./format.js";

const HISTORY = 100;
const UNREADY = 50;
const SPANS = [
  [60, "1 min"],
  [300, "5 min"],
  [900, "15 min"],
];

/** A status' services by rollout: `{name, services, …}` with what their first service says of the rollout. */
export function rollouts(status) {
  const byName = new Map();
  for (const service of status.services) {
    const name = service.rollout ?? service.name;
    if (!byName.has(name)) byName.set(name, { ...service, name, services: [] });
    byName.get(name).services.push(service);
  }
  return [...byName.values()];
}

/** Whether a rollout is on its way. */
export const isMoving = ({ phase }) => ["Waiting", "Progressing", "Paused"].includes(phase);

/** The view of the rollout `name`; `app` has the status, the record, the feed and the transitions. */
export function rolloutView(name, app) {
  const title = make("h1", { tabindex: -1 }, name);
  const phase = chip();
  const way = make("span", { class: "way" });
  const message = make("span");
  const since = make("span", { class: "since" });
  const why = make("p", { class: "why" }, message, since);
  const buttons = toolbar(name, app);
  const steps = stepsCard();
  const together = make("div", { class: "together" });
  const services = make("div", { class: "services" });
  const past = historyCard();
  const back = make("a", { class: "back", href: "#/" }, "All rollouts");
  const element = make(
    "div",
    { class: "rollout" },
    back,
    make("div", { class: "head" }, make("div", { class: "title" }, title, phase.element, way), why, buttons.element),
    steps.element,
    together,
    services,
    past.element,
  );
  let asked = null;
  const ask = () => {
    asked = app.status.epoch + app.connected;
    const path = `v1/rollouts/${encodeURIComponent(name)}`;
    call(`${path}/history`).then(
      ({ transitions }) => {
        app.remember(name, transitions);
        past.know(true);
      },
      () => past.know(false),
    );
    call(`${path}/series`).then(
      (series) => {
        app.record.fill(series, Date.now());
        app.render();
      },
      // The plots begin now, then.
      () => {},
    );
  };
  const update = () => {
    const all = rollouts(app.status);
    const rollout = all.find((one) => one.name === name);
    show(back, all.length > 1);
    if (asked !== app.status.epoch + app.connected) ask();
    const now = app.feed.now();
    phase.update(rollout.phase);
    say(way, rollout.target && rollout.target !== rollout.stable ? `${rollout.stable} → ${rollout.target}` : `${rollout.stable} serves`);
    say(message, rollout.message);
    say(since, sinceWords(rollout, now));
    buttons.update(rollout);
    steps.update(rollout, app.transitions(name));
    const several = rollout.services.length > 1;
    const told = marksOf(app.transitions(name), rollout.steps ?? [], app.feed.skew);
    const joint = several && rollout.verdict ? [rollout] : [];
    each(together, joint, () => name, () => togetherSection(app), told);
    each(services, rollout.services, (service) => `${several} ${service.name}`, (service) => serviceSection(service, app, several), told);
    element.classList.toggle("several", several);
    past.update(app.transitions(name), now);
  };
  const end = () => {
    each(together, [], () => name);
    each(services, [], (service) => service.name);
  };
  return { element, update, end, heading: title, title: () => pageTitle(app, name) };
}

/** Steps and phases as marks for the plots, of transitions that are the newest first. */
function marksOf(transitions, steps, skew) {
  const changed = transitions.filter(({ phase, step }, index) => {
    const before = transitions[index + 1];
    return phase !== before?.phase || (step && step !== before.step);
  });
  const weight = (step) => (steps[step - 1] ? words.percent(steps[step - 1].weight) : "");
  const text = ({ phase, step }) => (phase === "Progressing" ? weight(step) : phase);
  return changed.map((one) => ({ at: (Date.parse(one.time) - skew) / 1000, text: text(one) })).filter(({ at }) => at > 0);
}

function sinceWords({ reason, since, deadline, phase }, now) {
  const parts = [reason, `for ${words.span((now - Date.parse(since)) / 1000)}`].filter(Boolean);
  if (deadline && phase !== "Failed" && phase !== "Succeeded") {
    const left = (Date.parse(deadline) - now) / 1000;
    parts.push(left > 0 ? `counts as stuck in ${words.span(left)}` : "counts as stuck");
  }
  return parts.join(" · ");
}

function pageTitle(app, name) {
  const rollout = rollouts(app.status).find((one) => one.name === name);
  if (!rollout) return name;
  const target = rollout.versions.find((version) => version.name === rollout.target);
  return `${name}: ${rollout.phase}${target ? `, ${target.name} ${words.percent(target.weight)}` : ""}`;
}

/** How far back the plots reach. */
function rangeChooser(service, app) {
  const choices = SPANS.map(([seconds, text]) => {
    const choose = () => {
      app.seconds = seconds;
      app.render();
    };
    const input = make("input", { type: "radio", name: `range of ${service}`, value: seconds, onchange: choose });
    return { seconds, input, label: make("label", {}, input, make("span", {}, text)) };
  });
  const update = () => {
    for (const { seconds, input } of choices) input.checked = seconds === app.seconds;
  };
  const legend = make("legend", {}, "Plots of the last");
  return { element: make("fieldset", { class: "range" }, legend, ...choices.map(({ label }) => label)), update };
}

/** The steps as a track, the present one marked, how far it is held. */
function stepsCard() {
  const track = make("ol", { class: "track" });
  const element = make("section", { class: "card steps" }, make("h2", {}, "Steps"), track);
  const update = (rollout, transitions) => {
    const steps = rollout.steps ?? [];
    const present = rollout.step && isMoving(rollout) ? rollout.step : null;
    const target = rollout.versions.find((version) => version.name === rollout.target);
    const failed = rollout.phase === "Failed" ? failedStep(transitions) : undefined;
    const context = { done: doneSteps(rollout, failed), present, failed, target };
    show(element, steps.length);
    each(track, steps.map((step, index) => ({ ...step, number: index + 1 })), ({ number }) => number, trackStep, context);
  };
  return { element, update };
}

function trackStep() {
  const fill = make("i");
  const head = make("b");
  const note = make("span");
  const element = make("li", {}, make("span", { class: "bar", "aria-hidden": "true" }, fill), head, note);
  const update = (step, { done, present, failed, target }) => {
    const isPresent = step.number === present?.number;
    const isFailed = step.number === failed;
    const state = isPresent ? "present" : isFailed ? "failed" : step.number <= done ? "done" : "ahead";
    if (element.dataset.state !== state) element.dataset.state = state;
    set(element, "aria-current", isPresent ? "step" : null);
    say(head, words.percent(step.weight));
    say(note, isFailed ? "failed here" : stepNote(step, isPresent ? present : null, target));
    style(fill, "width", `${100 * progress(step, state, present)}%`);
  };
  return { element, update };
}

function doneSteps(rollout, failed) {
  if (rollout.phase === "Succeeded") return Infinity;
  const number = isMoving(rollout) ? rollout.step?.number : failed;
  return number ? number - 1 : 0;
}

/** The step at which the last rollout failed, as far as it is known what happened; `transitions` are the newest first. */
function failedStep(transitions) {
  return transitions.find(({ rollout, step }) => rollout === transitions[0].rollout && step)?.step;
}

function progress(step, state, present) {
  if (state !== "present") return state === "ahead" ? 0 : 1;
  if (present.heldSeconds === undefined || !step.holdSeconds) return 0;
  return Math.min(1, present.heldSeconds / step.holdSeconds);
}

function stepNote(step, present, target) {
  const parts = [];
  if (present && target && present.heldSeconds === undefined) {
    parts.push(`has ${words.percent(target.weight)}`);
  } else if (step.holdSeconds) {
    const held = present ? words.heldOf(present.heldSeconds ?? 0, step.holdSeconds) : words.span(step.holdSeconds);
    parts.push(`${present ? "held" : "hold"} ${held}`);
  }
  if (step.pause) parts.push("pause");
  if (step.matches) parts.push(words.plural(step.matches, "match for testers", "matches for testers"));
  return parts.join(", ");
}

/** What is said of all services of a rollout at once: there is one verdict, whatever one of them alone is like. */
function togetherSection(app) {
  const verdict = verdictCard();
  const drawn = plots(["evidence"]);
  const element = make(
    "section",
    {},
    make("h2", {}, "All services together"),
    make("div", { class: "pair" }, drawn.element, verdict.element),
  );
  const update = (rollout, told) => {
    verdict.update(rollout);
    drawn.update(rollout.services[0], app.record, app.seconds, told);
  };
  return { element, update, end: drawn.end };
}

/** A service's versions and plots, and the verdict unless it is of several services together. */
function serviceSection(service, app, several) {
  const heading = make("h2", {}, service.name);
  const unrouted = make("p", { class: "warning" });
  const vetoes = make("ul", { class: "vetoes" });
  const versions = versionsTable(service.name, app);
  const verdict = several ? null : verdictCard();
  const range = rangeChooser(service.name, app);
  const drawn = plots(several ? ["shares", "errors", "requests"] : undefined);
  const element = make(
    "section",
    { class: "service", "data-service": service.name },
    heading,
    unrouted,
    vetoes,
    make("div", { class: "pair" }, versions.element, verdict?.element),
    range.element,
    drawn.element,
  );
  const update = (service, told) => {
    show(unrouted, service.unrouted > 0);
    say(unrouted, `${words.plural(service.unrouted, "request", "requests")} found no version in service and went to Envoy's default route.`);
    each(vetoes, vetoesOf(app.status, service), ({ proxy, version }) => `${proxy} ${version}`, () => {
      const item = make("li");
      return { element: item, update: (veto) => say(item, vetoWords(veto)) };
    });
    versions.update(service);
    verdict?.update(service);
    range.update();
    drawn.update(service, app.record, app.seconds, told);
  };
  return { element, update, end: drawn.end };
}

function vetoesOf(status, service) {
  const all = status.proxies.flatMap(({ id, vetoes }) => (vetoes ?? []).map((veto) => ({ ...veto, proxy: id })));
  return all.filter((veto) => veto.service === service.name).slice(0, UNREADY);
}

/** A guard's veto in words. */
export function vetoWords({ proxy, version, until, requests, errors, othersRequests, othersErrors }) {
  const where = proxy ? `The guard of ${proxy}` : "The guard";
  const others = `of the others ${words.count(othersErrors)} of ${words.count(othersRequests)}`;
  const end = words.clock(Date.parse(until));
  return `${where} keeps ${version} out until ${end}: ${words.count(errors)} of ${words.count(requests)} failed, ${others}.`;
}

const COLUMNS = ["Version", "Share", "Ready", "Requests", "OK", "Errors", "4xx", "Cancelled", "Error rate", "In flight", "Drain"];

function versionsTable(service, app) {
  const body = make("tbody", { role: "rowgroup" });
  const head = COLUMNS.map((column) => make("th", { scope: "col", role: "columnheader" }, column));
  const table = make(
    "table",
    { role: "table", class: "versions" },
    make("caption", { class: "unseen" }, "Versions"),
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head)),
    body,
  );
  const card = make("div", { class: "card scrolls", role: "region", "aria-label": `Versions of ${service}` }, table);
  const update = (service) => {
    each(body, service.versions, (version) => version.name, () => versionRow(app), service);
    // What scrolls can be scrolled by keyboard.
    set(card, "tabindex", card.scrollWidth > card.clientWidth ? 0 : null);
  };
  return { element: card, update };
}

function versionRow(app) {
  const cells = COLUMNS.slice(1).map((column) => make("td", { role: "cell", "data-label": column }));
  const [share, ready, requests, ok, errors, clientErrors, cancelled, rate, inFlight, drain] = cells;
  const swatch = make("span", { class: "swatch" });
  const name = make("span", { class: "name" });
  const role = make("small", { class: "role" });
  const bar = make("span", { class: "meter", "aria-hidden": "true" }, make("i"));
  const weight = make("b");
  share.append(weight, bar);
  const endpoints = endpointsCell(ready);
  const element = make("tr", { role: "row" }, make("th", { scope: "row", role: "rowheader" }, swatch, name, role), ...cells);
  const update = (version, service) => {
    const place = colour(service.versions.findIndex((one) => one.name === version.name));
    const now = app.record.rates(service.name, version.name);
    style(swatch, "background-color", place);
    say(name, version.name);
    say(role, roleOf(version, service));
    say(weight, words.percent(version.weight));
    style(bar.firstChild, "width", `${Math.min(100, version.weight)}%`);
    style(bar.firstChild, "background-color", place);
    endpoints(version);
    say(requests, words.perSecond(now.requests));
    say(ok, words.count(version.requests.ok));
    say(errors, words.count(version.requests.error));
    say(clientErrors, words.count(version.requests.clientError));
    say(cancelled, words.count(version.requests.cancelled));
    say(rate, words.rate(now.errors));
    rate.classList.toggle("bad", now.errors >= 0.02);
    say(inFlight, words.count(version.inFlight));
    say(drain, drainWords(version, app.feed.now()));
    drain.classList.toggle("blank", drain.textContent === words.UNKNOWN);
    set(drain, "title", version.drain?.message ?? null);
  };
  return { element, update };
}

function roleOf(version, service) {
  const roles = [];
  if (version.name === service.stable) roles.push("stable");
  if (version.name === service.target) roles.push("target");
  if (!version.serving) roles.push("out of service");
  return roles.join(", ");
}

function drainWords({ drain }, now) {
  if (!drain || drain.state === "Serving") return words.UNKNOWN;
  const state = { Draining: "draining", Drained: "drained", DeadlineExceeded: "deadline over" }[drain.state] ?? drain.state;
  return drain.since ? `${state}, ${words.ago(drain.since, now)}` : state;
}

/** `3/4`, which unfolds into why some are not ready. */
function endpointsCell(cell) {
  const plain = make("span");
  const summary = make("summary");
  const list = make("ul");
  const details = make("details", {}, summary, list);
  cell.append(plain, details);
  return ({ endpoints }) => {
    const unready = endpoints.notReady ?? [];
    const text = `${words.count(endpoints.ready)}/${words.count(endpoints.listed)}`;
    show(plain, unready.length === 0);
    show(details, unready.length > 0);
    say(plain, text);
    say(summary, text);
    set(summary, "aria-label", `${text} ready: why not all`);
    cell.classList.toggle("short", endpoints.ready < endpoints.listed);
    const shown = unready.slice(0, UNREADY).map(({ endpoint, reason }) => ({ endpoint, text: `${endpoint}: ${reason ?? "not probed yet"}` }));
    const more = unready.length - shown.length;
    if (more > 0) shown.push({ endpoint: "", text: `and ${words.count(more)} more` });
    each(list, shown, ({ endpoint }) => endpoint, () => {
      const item = make("li");
      return { element: item, update: ({ text }) => say(item, text) };
    });
  };
}

/** The verdict in a sentence, and its evidence against the bounds. */
function verdictCard() {
  const outcome = make("span", { class: "outcome" });
  const message = make("p");
  const fail = meter("bad");
  const pass = meter("good");
  const latency = meter("bad");
  const latencyMessage = make("p", { class: "note" });
  const element = make(
    "section",
    { class: "card verdict" },
    make("h3", {}, "Verdict", outcome),
    message,
    fail.element,
    pass.element,
    latency.element,
    latencyMessage,
  );
  const update = ({ verdict, target }) => {
    show(element, verdict);
    if (!verdict) return;
    element.dataset.outcome = verdict.outcome;
    say(outcome, verdict.outcome);
    say(message, verdict.message);
    const name = target ?? "the target";
    fail.update(`Is ${name} worse?`, words.odds(verdict.evidence, verdict.bound), verdict.evidence, verdict.bound);
    const { passEvidence, passBound } = verdict;
    pass.update(`Is ${name} good enough?`, words.sureness(passEvidence, passBound), passEvidence, passBound);
    show(latency.element, verdict.latency);
    show(latencyMessage, verdict.latency);
    if (verdict.latency) {
      const { evidence, bound } = verdict.latency;
      latency.update(`Is ${name} slower?`, words.odds(evidence, bound), evidence, bound);
      say(latencyMessage, verdict.latency.message);
    }
  };
  return { element, update };
}

/** Evidence against its bound, logarithmic from 1 (none) to the bound. */
function meter(kind) {
  const label = make("span");
  const value = make("span", { class: "value" });
  const fill = make("i");
  const bar = make("span", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
  const element = make("div", { class: `evidence ${kind}` }, label, value, bar);
  const update = (question, answer, evidence, bound) => {
    show(element, bound > 0);
    const part = evidence > 1 && bound > 1 ? Math.min(1, Math.log(evidence) / Math.log(bound)) : 0;
    say(label, question);
    say(value, answer);
    style(fill, "width", `${100 * part}%`);
    set(bar, "aria-label", question);
    set(bar, "aria-valuenow", Math.round(100 * part));
    set(bar, "aria-valuetext", answer);
    element.classList.toggle("reached", part >= 1);
  };
  return { element, update };
}

/** What happened, newest first. */
function historyCard() {
  const list = make("ol", { class: "history" });
  const none = make("p", { class: "nothing" });
  const element = make("section", { class: "card" }, make("h2", {}, "What happened"), list, none);
  let known = null;
  const update = (transitions, now) => {
    show(none, transitions.length === 0);
    say(none, known === false ? "This controller does not tell its history." : "Nothing yet.");
    each(list, transitions.slice(0, HISTORY), ({ key }) => key, pastRow, now);
  };
  return { element, update, know: (value) => (known = value) };
}

function pastRow({ time, phase, reason, step, message, leftOut }) {
  const mark = chip();
  mark.update(phase);
  const when = make("time", { datetime: time, title: words.date(time) });
  const what = [reason, step ? `step ${step}` : ""].filter(Boolean).join(", ");
  const element = make("li", {}, when, mark.element, make("b", {}, what), make("span", {}, leftOut ? `${message} (${leftOut} like it before are left out)` : message));
  return { element, update: (_, now) => say(when, words.ago(time, now)) };
}
