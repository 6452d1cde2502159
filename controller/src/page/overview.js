// All rollouts with their shares, and all proxies: lists that can be searched, since there may be many.

import { chip, each, make, say, set, shareBar, show } from "./dom.js";
import { isMoving, rollouts, vetoWords } from "./rollout.js";
import * as words from "./format.js";

/** From so many on there is a search. */
const MANY = 8;
const SHOWN = 300;

/** A list with a search: `match(item)` is the text that is searched, `row(item)` a child. */
function searchable({ what, match, key, row, element }) {
  let wanted = "";
  let redo = () => {};
  const input = make("input", {
    type: "search",
    autocomplete: "off",
    spellcheck: "false",
    "aria-label": `Search ${what}`,
    placeholder: `Search ${what}`,
    oninput: () => {
      wanted = input.value.trim().toLowerCase();
      redo();
    },
  });
  const hits = make("span", { role: "status", class: "note" });
  const bar = make("div", { class: "search" }, input, hits);
  const update = (items) => {
    redo = () => update(items);
    show(bar, items.length >= MANY || wanted);
    const found = wanted ? items.filter((item) => match(item).toLowerCase().includes(wanted)) : items;
    each(element, found.slice(0, SHOWN), key, row);
    const cut = found.length > SHOWN ? `the first ${SHOWN} of ` : "";
    say(hits, wanted || cut ? `${cut}${words.count(found.length)} of ${words.count(items.length)}` : "");
  };
  return { bar, update };
}

/** All rollouts; those on their way and those that failed come first. */
export function overview(app) {
  const heading = make("h1", { tabindex: -1 }, "Rollouts");
  const list = make("ul", { class: "rollouts" });
  const none = make("p", { class: "empty" }, "No rollouts: the controller has no document yet.");
  const rows = searchable({
    what: "rollouts",
    element: list,
    key: ({ name }) => name,
    match: ({ name, services, phase, target }) => [name, phase, target ?? "", ...services.map((one) => one.name)].join(" "),
    row: () => rolloutRow(app),
  });
  const update = () => {
    const all = rollouts(app.status);
    const rank = (rollout) => (isMoving(rollout) ? 0 : rollout.phase === "Failed" ? 1 : 2);
    rows.update(all.toSorted((a, b) => rank(a) - rank(b) || a.name.localeCompare(b.name)));
    show(none, all.length === 0);
  };
  const element = make("div", { class: "overview" }, make("div", { class: "top" }, heading, rows.bar), list, none);
  return { element, update, heading, title: () => "Rollouts" };
}

/** The highest of the rates that are known; NaN if none is. */
function worst(rates) {
  const known = rates.filter((rate) => rate >= 0);
  return known.length ? Math.max(...known) : NaN;
}

function rolloutRow(app) {
  const phase = chip();
  const bar = shareBar();
  const shares = make("span", { class: "shares" });
  const step = make("span", { class: "step" });
  const message = make("span", { class: "message" });
  const errors = make("span", { class: "errors" });
  const link = make("a");
  const element = make(
    "li",
    {},
    link,
    phase.element,
    make("span", { class: "split" }, bar.element, shares),
    errors,
    step,
    message,
  );
  const update = (rollout) => {
    set(link, "href", `#/rollout/${encodeURIComponent(rollout.name)}`);
    say(link, rollout.name);
    phase.update(rollout.phase);
    bar.update(rollout.versions);
    const served = rollout.versions.filter((version) => version.weight > 0);
    say(shares, served.map((version) => `${version.name} ${words.percent(version.weight)}`).join(" · ") || "nothing serves");
    const rates = served.map(({ name }) => worst(rollout.services.map((service) => app.record.rates(service.name, name).errors)));
    say(errors, rates.some((rate) => rate >= 0) ? `errors ${rates.map(words.rate).join(" · ")}` : "");
    const services = rollout.services.length > 1 ? words.plural(rollout.services.length, "service", "services") : "";
    const at = rollout.step && isMoving(rollout) ? `step ${rollout.step.number} of ${rollout.step.of}` : "";
    say(step, [at, services].filter(Boolean).join(" · "));
    say(message, rollout.message);
  };
  return { element, update };
}

/** Whether a proxy has not got the policy that is in force. */
export const isBehind = (proxy, status) => proxy.revision !== status.revision;

const COLUMNS = ["Proxy", "Revision", "Workers", "Last seen", "Remarks"];

/** All proxies; those that something is wrong with come first. */
export function proxies(app) {
  const heading = make("h1", { tabindex: -1 }, "Proxies");
  const about = make("p", { class: "message" });
  const body = make("tbody", { role: "rowgroup" });
  const head = COLUMNS.map((column) => make("th", { scope: "col", role: "columnheader" }, column));
  const table = make(
    "table",
    { role: "table", class: "proxies" },
    make("caption", { class: "unseen" }, "Proxies"),
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head)),
    body,
  );
  const card = make("div", { class: "card" }, table);
  // One that has just been started again is there twice, and so are two that share an id by mistake.
  const key = ({ id, start }) => `${start} ${id}`;
  const rows = searchable({ what: "proxies", element: body, key, match: ({ id }) => id, row: () => proxyRow(app) });
  const update = () => {
    const { status } = app;
    const there = status.proxies;
    const behind = there.filter((proxy) => isBehind(proxy, status)).length;
    const all = words.plural(there.length, "proxy", "proxies");
    const policy = `The policy in force is revision ${status.revision}`;
    if (!there.length) say(about, `${policy}. No proxy has asked for it yet.`);
    else say(about, `${policy}; ${behind ? `${words.count(behind)} of ${all} behind` : `${all}, none behind`}.`);
    const rank = (proxy) => (proxy.refused ? 0 : proxy.vetoes?.length ? 1 : isBehind(proxy, status) ? 2 : 3);
    rows.update(there.toSorted((a, b) => rank(a) - rank(b) || a.id.localeCompare(b.id)));
    show(card, there.length);
  };
  const element = make("div", {}, make("div", { class: "top" }, heading, rows.bar), about, card);
  return { element, update, heading, title: () => "Proxies" };
}

function proxyRow(app) {
  const cells = COLUMNS.slice(1).map((column) => make("td", { role: "cell", "data-label": column }));
  const [revision, workers, seen, remarks] = cells;
  const id = make("th", { scope: "row", role: "rowheader" });
  const list = make("ul");
  remarks.append(list);
  const update = (proxy) => {
    const behind = isBehind(proxy, app.status);
    say(id, proxy.id);
    say(revision, `${proxy.revision ?? "its own"}${behind ? ", behind" : ""}`);
    revision.classList.toggle("short", behind);
    say(workers, words.count(proxy.workers));
    say(seen, words.ago(proxy.lastSeen, app.feed.now()));
    set(seen, "title", words.date(proxy.lastSeen));
    const refused = (proxy.refused?.errors ?? []).map((error) => `Refused revision ${proxy.refused.revision ?? "unknown"}: ${error}`);
    const all = [...refused, ...(proxy.vetoes ?? []).map((veto) => `${veto.service}: ${vetoWords(veto)}`)];
    each(list, all, (text) => text, (text) => ({ element: make("li", {}, text), update: () => {} }));
  };
  return { element: make("tr", { role: "row" }, id, ...cells), update };
}
