// The buttons of a rollout. Each says before what will happen, in words, and is asked once more; one that does not fit the
// present state says why.

import { make, say, set, show } from "./dom.js";
import { Refusal, command, token } from "./sse.js";
import * as words from "./format.js";

const isMoving = ({ phase }) => ["Waiting", "Progressing", "Paused"].includes(phase);
const isPaused = ({ phase, paused }) => paused || phase === "Paused";
const moving = (rollout) => (isMoving(rollout) ? null : "No rollout is on its way.");
const allowed = (rollout) => moving(rollout) ?? (rollout.phase === "Waiting" ? "Its gate has not allowed the present step." : null);
const several = (rollout) => (rollout.versions.length > 1 ? null : "There is only one version.");
const version = (rollout, name) => rollout.versions.find((one) => one.name === name);
/** The versions that it does not go to, or that do not serve, as they stand. */
function others(rollout) {
  const now = isMoving(rollout) ? rollout.target : rollout.stable;
  return rollout.versions.map(({ name }) => name).filter((name) => name !== now);
}

/** What the versions of a name can carry, over all of the rollout's services. */
function capacity(rollout, name) {
  const endpoints = { ready: 0, listed: 0 };
  for (const one of rollout.services.flatMap(({ versions }) => versions).filter((one) => one.name === name)) {
    endpoints.ready += one.endpoints.ready;
    endpoints.listed += one.endpoints.listed;
  }
  return `as far as its endpoints can carry it (${words.ready({ endpoints })})`;
}

const shares = (rollout) =>
  rollout.versions
    .filter(({ weight }) => weight > 0)
    .map(({ name, weight }) => `${name} ${words.percent(weight)}`)
    .join(", ");

function next({ step, steps = [], target }) {
  const following = step && steps[step.number];
  if (!following) return "This is the last step: the rollout ends.";
  return `Step ${step.number + 1} of ${step.of} begins: ${target} gets ${words.percent(following.weight)}.`;
}

const back = (rollout, to) => `Traffic goes back to ${to}, ${capacity(rollout, to)}`;

/**
 * The commands: `fits` gives the reason why not, or `null`; `says` what will happen with the `value` of the field; `field`
 * what is to choose; `body` what is sent.
 */
const COMMANDS = [
  {
    id: "promote",
    label: () => "Promote",
    fits: allowed,
    says: (rollout) => {
      const past = isPaused(rollout) ? "The pause ends." : "The present hold ends now, also if the verdict is undecided.";
      return `${past} ${next(rollout)}`;
    },
    body: () => ({ full: false }),
  },
  {
    id: "promote-full",
    path: "promote",
    label: () => "Promote to the end",
    fits: moving,
    says: (rollout) =>
      `All steps that are left are skipped: ${rollout.target} gets 100\u00a0%, ${capacity(rollout, rollout.target)}.`,
    body: () => ({ full: true }),
  },
  {
    id: "pause",
    label: () => "Pause",
    shown: (rollout) => !isPaused(rollout),
    fits: moving,
    says: (rollout) => `The rollout stays where it is (${shares(rollout)}) until you resume or promote it.`,
  },
  {
    id: "resume",
    label: () => "Resume",
    shown: isPaused,
    fits: moving,
    says: (rollout) => `The rollout goes on from where it is (${shares(rollout)}).`,
  },
  {
    id: "abort",
    label: () => "Abort",
    danger: true,
    fits: moving,
    says: (rollout) => `${back(rollout, rollout.stable)}; ${rollout.target} gets nothing any more. The rollout ends as Failed.`,
  },
  {
    id: "rollback",
    label: () => "Roll back…",
    confirm: "Roll back",
    danger: true,
    fits: several,
    field: { label: "Version to go back to", options: others, first: (rollout) => rollout.stable },
    says: (rollout, to) => {
      if (to === rollout.stable) return `${back(rollout, to)}; ${rollout.target} gets nothing any more. The rollout ends as Failed.`;
      return `${to} gets all traffic at once, without steps, ${capacity(rollout, to)}.`;
    },
    body: (to) => ({ to }),
  },
  {
    id: "set-target",
    label: () => "Set target…",
    confirm: "Set target",
    fits: several,
    field: { label: "Version to move to", options: others },
    says: (rollout, to) => {
      if (to === rollout.stable) return `The rollout to ${rollout.target} is withdrawn. ${back(rollout, to)}.`;
      const before = isMoving(rollout) ? ` It takes the place of the one to ${rollout.target}.` : "";
      return `A rollout from ${rollout.stable} to ${to} begins at its first step.${before}`;
    },
    body: (target) => ({ target }),
  },
  {
    id: "set-weight",
    label: () => "Set weight…",
    confirm: "Set weight",
    fits: allowed,
    field: {
      label: "Percent of the target",
      number: (rollout) => Math.round(version(rollout, rollout.target)?.weight ?? 0),
    },
    says: (rollout, weight) =>
      `${rollout.target} gets ${weight}\u00a0% of the traffic, ${capacity(rollout, rollout.target)}, and ${rollout.stable} ` +
      "the rest. The rollout is paused there.",
    body: (weight) => ({ weight: Number(weight) }),
  },
];

/** The buttons of the rollout `name`. */
export function toolbar(name, app) {
  let rollout = null;
  const why = make("p", { class: "note" });
  const reasonOf = (one) => {
    if (app.feed.state !== "live") return "The controller is not heard now.";
    return rollout ? one.fits(rollout) : "";
  };
  const buttons = COMMANDS.map((one) => {
    const reason = make("span", { class: "unseen", id: `why-${one.id}` });
    const tell = () => say(why, reasonOf(one) ? `${one.label().replace("…", "")}: ${reasonOf(one)}` : "");
    const refuse = () => {
      tell();
      app.announce(why.textContent);
    };
    const button = make("button", { type: "button", class: one.danger ? "danger" : "", "data-command": one.id }, one.label());
    button.addEventListener("click", () => (reasonOf(one) ? refuse() : ask(one, name, () => rollout, reasonOf, app)));
    button.addEventListener("focus", tell);
    button.addEventListener("mouseenter", tell);
    for (const leave of ["blur", "mouseleave"]) button.addEventListener(leave, () => say(why, ""));
    return { one, button, reason };
  });
  const update = (next) => {
    rollout = next;
    for (const { one, button, reason } of buttons) {
      show(button, !one.shown || one.shown(rollout));
      // Not `disabled`, which would take it out of the keyboard's reach together with the reason.
      const unfit = reasonOf(one);
      set(button, "aria-disabled", unfit ? "true" : null);
      set(button, "aria-describedby", unfit ? reason.id : null);
      say(reason, unfit ?? "");
    }
  };
  const group = make("div", { role: "group", "aria-label": `Commands for ${name}`, class: "buttons" });
  group.append(...buttons.flatMap(({ button, reason }) => [button, reason]));
  return { element: make("div", { class: "toolbar" }, group, why), update };
}

/** Opens a dialog that is thrown away when it closes. */
function open(dialog) {
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function ask(one, name, rolloutNow, reasonOf, app) {
  const text = make("p");
  const problem = make("p", { class: "problem", role: "alert", hidden: true });
  const confirm = make("button", { type: "submit", class: one.danger ? "danger solid" : "solid" }, one.confirm ?? one.label());
  const cancel = make("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
  const field = one.field ? fieldOf(one.field, rolloutNow()) : null;
  const enter = make("button", { type: "button", class: "quiet", hidden: true, onclick: () => askToken(app) }, "Enter a token");
  const form = make(
    "form",
    { method: "dialog" },
    make("h2", { id: "asked" }, `${one.confirm ?? one.label()}: ${name}`),
    field?.element ?? null,
    text,
    problem,
    make("div", { class: "buttons" }, enter, cancel, confirm),
  );
  const dialog = make("dialog", { "aria-labelledby": "asked", class: "command" }, form);
  let busy = false;
  // What it says keeps up with the rollout, which moves on meanwhile.
  const update = () => {
    const unfit = reasonOf(one);
    say(text, unfit || one.says(rolloutNow(), field?.value()));
    set(confirm, "aria-disabled", unfit || busy ? "true" : null);
  };
  field?.element.addEventListener("input", update);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy || confirm.getAttribute("aria-disabled")) return;
    busy = true;
    show(problem, false);
    update();
    try {
      await command(name, one.path ?? one.id, one.body?.(field?.value()) ?? {});
      app.announce(`${one.confirm ?? one.label()}: done.`);
      dialog.close();
    } catch (error) {
      say(problem, error instanceof Refusal ? error.message : "The controller could not be reached.");
      show(problem, true);
      show(enter, error.wantsToken);
    }
    busy = false;
    update();
  });
  const watch = app.onRender(update);
  dialog.addEventListener("close", watch);
  update();
  open(dialog);
  (field?.input ?? cancel).focus();
  field?.input.select?.();
}

function fieldOf(field, rollout) {
  if (field.options) {
    const options = field.options(rollout);
    const input = make("select", { id: "choice" }, ...options.map((name) => make("option", { value: name }, name)));
    const first = field.first?.(rollout);
    if (options.includes(first)) input.value = first;
    return { input, value: () => input.value, element: make("p", { class: "field" }, make("label", { for: "choice" }, field.label), input) };
  }
  const limits = { min: 0, max: 100, step: 1, value: field.number(rollout) };
  const input = make("input", { id: "choice", type: "number", inputmode: "numeric", required: true, ...limits });
  const slider = make("input", { type: "range", "aria-label": field.label, ...limits, oninput: () => (input.value = slider.value) });
  input.addEventListener("input", () => (slider.value = input.value));
  const element = make("p", { class: "field" }, make("label", { for: "choice" }, field.label), input, slider);
  return { input, value: () => input.value, element };
}

/** Asks for the token, which stays in this tab. */
export function askToken(app) {
  const input = make("input", { id: "token-field", type: "password", autocomplete: "off", spellcheck: "false", value: token.get() });
  const keep = (value) => {
    token.set(value);
    app.feed.again();
    dialog.close();
  };
  const form = make(
    "form",
    { method: "dialog" },
    make("h2", { id: "asked-token" }, "Token"),
    make("p", {}, "A read token shows, an operate token also commands. It is kept for this tab only, until it is closed."),
    make("p", { class: "field" }, make("label", { for: "token-field" }, "Token"), input),
    make(
      "div",
      { class: "buttons" },
      make("button", { type: "button", class: "quiet", onclick: () => keep("") }, "Forget it"),
      make("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
      make("button", { type: "submit", class: "solid" }, "Use it"),
    ),
  );
  const dialog = make("dialog", { "aria-labelledby": "asked-token" }, form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    keep(input.value.trim());
  });
  open(dialog);
  input.focus();
}

