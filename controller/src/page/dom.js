// Making elements and keeping them up to date. Text only ever becomes text: nothing here takes markup.

/** An element: `make("p", {class: "note", onclick: f, "aria-label": "x"}, "text", child)`. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else set(element, name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Sets an attribute, or removes it for `null` and `false`; what is so already is not touched. */
export function set(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : value);
}

/** Sets the text of an element that holds nothing else; what is so already is not touched, so nothing flickers. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sets a style property, by the CSS object model, which the content security policy allows. */
export function style(element, name, value) {
  if (element.style.getPropertyValue(name) !== String(value)) element.style.setProperty(name, value);
}

/** Shows an element or not. */
export function show(element, shown) {
  if (element.hidden === Boolean(shown)) element.hidden = !shown;
}

const KEPT = new WeakMap();

/**
 * Gives `parent` one child for each item, in their order. `create(item)` returns `{element, update(item, context)}`; a child
 * lives as long as there is an item of its key, so that focus, selection and what is unfolded stay. Whatever changes besides
 * the item is the `context`: what `create` closes over is as old as the child.
 */
export function each(parent, items, key, create, context) {
  const before = KEPT.get(parent) ?? new Map();
  const after = new Map();
  let place = parent.firstChild;
  for (const item of items) {
    const name = key(item);
    if (after.has(name)) continue;
    const child = before.get(name) ?? create(item);
    after.set(name, child);
    child.update(item, context);
    if (child.element === place) place = place.nextSibling;
    else parent.insertBefore(child.element, place);
  }
  for (const [name, child] of before) {
    if (!after.has(name)) {
      child.element.remove();
      child.end?.();
    }
  }
  KEPT.set(parent, after);
}

const SHAPES = {
  Initialized: "M8 3a5 5 0 1 0 0 10A5 5 0 0 0 8 3Zm0 1.8a3.2 3.2 0 1 1 0 6.4 3.2 3.2 0 0 1 0-6.4Z",
  Waiting: "M8 2.5a5.500 5.500 0 1 0 0 11 5.500 5.500 0 0 0 0-11Zm.8 2.500v2.700l2 1.200-.8 1.300-2.700-1.700V5Z",
  Progressing: "M5 3v10l8-5Z",
  Paused: "M4 3h3v10H4Zm5 0h3v10H9Z",
  Succeeded: "m6.500 12.500-4-4 1.600-1.600 2.400 2.400 5.500-5.500 1.600 1.600Z",
  Failed: "m4.500 3 3.500 3.500L11.500 3 13 4.500 9.500 8l3.500 3.500-1.500 1.500L8 9.500 4.500 13 3 11.500 6.500 8 3 4.500Z",
};

/** A small picture of a phase; words beside it say the same. */
export function icon(phase) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", SHAPES[phase] ?? SHAPES.Initialized);
  svg.append(path);
  return svg;
}

/** A phase in a word and a picture. */
export function chip() {
  const element = make("span", { class: "chip" });
  const update = (phase) => {
    if (element.dataset.phase === phase) return;
    element.dataset.phase = phase;
    element.replaceChildren(icon(phase), phase);
  };
  return { element, update };
}

/** A service's shares as one bar of the versions' colours. */
export function shareBar() {
  const element = make("span", { class: "sharebar", "aria-hidden": "true" });
  const create = () => {
    const part = make("span");
    const update = ({ weight, index }) => {
      style(part, "flex-grow", weight);
      style(part, "background-color", colour(index));
    };
    return { element: part, update };
  };
  // One without a share has no place in it: the gaps beside it would be seen.
  const update = (versions) => {
    const parts = versions.map((version, index) => ({ ...version, index })).filter(({ weight }) => weight > 0);
    each(element, parts, ({ name }) => name, create);
  };
  return { element, update };
}

/** How many colours for versions there are; after that they begin again. */
export const COLOURS = 8;

/** The colour of a service's n-th version, as CSS. */
export function colour(index) {
  return `var(--v${index % COLOURS})`;
}
