// The plots of one service, by uPlot: shares, requests, errors, and the evidence against its bound.

import { COLOURS, make, say, set, style, each } from "./dom.js";
import * as words from "./format.js";

/* global uPlot */

const HEIGHT = 168;
const FONT = 11;
/** Evidence below this is drawn as this: a logarithmic axis has no zero. */
const FLOOR = 0.1;
const LABELS = 58;
/** What was seen within so many seconds of what was told is the same: clocks may differ a little. */
const SAME = 3;
/** A page that was opened just now shows less than was asked for, instead of an empty plot. */
const SPANS = [60, 120, 300, 600, 900];

/** The colours that CSS has in force. */
function theme() {
  const styles = getComputedStyle(document.documentElement);
  const value = (name) => styles.getPropertyValue(name).trim();
  return {
    ink: value("--ink"),
    muted: value("--muted"),
    line: value("--line"),
    surface: value("--surface"),
    bad: value("--bad"),
    good: value("--good"),
    versions: Array.from({ length: COLOURS }, (_, index) => value(`--v${index}`)),
    font: `${FONT}px ${getComputedStyle(document.body).fontFamily}`,
    bold: `600 ${FONT}px ${getComputedStyle(document.body).fontFamily}`,
  };
}

/** How many of the `wanted` seconds there is something to see of. */
function reach(record, seen, wanted) {
  const known = record.last - seen.first + 1;
  return Math.min(wanted, SPANS.find((span) => span >= known) ?? wanted);
}

/** Text on the canvas, at its own size whatever the screen's density. */
function write(plot, text, x, y, { fill, font, align = "left", halo }) {
  const { ctx } = plot;
  const ratio = uPlot.pxRatio;
  ctx.save();
  ctx.font = font.replace(/(\d+)px/, (_, size) => `${size * ratio}px`);
  ctx.textAlign = align;
  ctx.textBaseline = "middle";
  if (halo) {
    ctx.lineWidth = 3 * ratio;
    ctx.lineJoin = "round";
    ctx.strokeStyle = halo;
    ctx.strokeText(text, x, y);
  }
  ctx.fillStyle = fill;
  ctx.fillText(text, x, y);
  ctx.restore();
}

function cut(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

/** Names beside the ends of their lines, moved apart where they would cover each other. */
function labels(plot, entries, halo) {
  const ratio = uPlot.pxRatio;
  const { top, height } = plot.bbox;
  const gap = (FONT + 2) * ratio;
  const placed = entries.filter(Boolean).sort((a, b) => a.y - b.y);
  placed.forEach((entry, index) => {
    entry.y = Math.max(entry.y, index ? placed[index - 1].y + gap : top + gap / 2);
  });
  let limit = top + height - gap / 2;
  for (const entry of placed.toReversed()) {
    entry.y = Math.min(entry.y, limit);
    limit = entry.y - gap;
  }
  for (const { x, y, text, fill, font } of placed) write(plot, cut(text, 9), x + 6 * ratio, y, { fill, font, halo });
}

/** What was seen to happen, and what was only told of. */
function both(seen, told) {
  const unseen = told.filter(({ at }) => !seen.some((mark) => Math.abs(mark.at - at) <= SAME));
  return [...seen, ...unseen].sort((a, b) => a.at - b.at);
}

/** Thin lines where a step began or the phase changed, named as far as there is room; the last ones first. */
function marks(plot, entries, look) {
  const ratio = uPlot.pxRatio;
  const { ctx, bbox } = plot;
  const end = bbox.left + bbox.width;
  let free = end;
  for (const { at, text } of entries.toReversed()) {
    const x = plot.valToPos(at, "x", true);
    if (x < bbox.left || x > end) continue;
    ctx.save();
    ctx.strokeStyle = look.muted;
    ctx.globalAlpha = 0.6;
    ctx.lineWidth = ratio;
    ctx.setLineDash([2 * ratio, 3 * ratio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.font = look.font.replace(/(\d+)px/, (_, size) => `${size * ratio}px`);
    const width = ctx.measureText(text).width + 6 * ratio;
    ctx.restore();
    // To the right of its line, or to the left of it at the end of the plot.
    const from = x + width <= free ? x : free === end ? x - width : null;
    if (!text || from === null) continue;
    write(plot, text, from + 2 * ratio, bbox.top - 8 * ratio, { fill: look.muted, font: look.font });
    free = from;
  }
}

/** A line across the plot at a bound, with what it means. */
function bound(plot, value, text, fill, look) {
  const ratio = uPlot.pxRatio;
  const { ctx, bbox } = plot;
  const y = plot.valToPos(value, "y", true);
  ctx.save();
  ctx.strokeStyle = fill;
  ctx.lineWidth = 1.5 * ratio;
  ctx.setLineDash([6 * ratio, 4 * ratio]);
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.restore();
  write(plot, text, bbox.left + 4 * ratio, y - 8 * ratio, { fill, font: look.font, halo: look.surface });
}

/**
 * What each plot shows. `lines(seen, service, look)` gives `{name, text(value), values, stroke}`; the rest says how it is drawn.
 */
const KINDS = [
  {
    id: "shares",
    nothing: "Nothing seen yet.",
    title: "Share of requests",
    note: "as given to proxies",
    marked: true,
    stacked: true,
    lines: (seen, service, look) =>
      service.versions.map((version, index) => ({
        name: version.name,
        text: words.percent,
        series: seen.version(version.name).share,
        stroke: look.versions[index % COLOURS],
      })),
    range: () => [0, 100],
    axis: (value) => `${value}%`,
  },
  {
    id: "errors",
    nothing: "No requests seen yet.",
    title: "Errors",
    note: "share of requests, over 5 s",
    lines: (seen, service, look) =>
      service.versions.map((version, index) => ({
        name: version.name,
        text: words.rate,
        series: seen.version(version.name).errors,
        stroke: look.versions[index % COLOURS],
      })),
    range: (top) => [0, Math.min(1, Math.max(0.01, top * 1.15))],
    axis: (value) => `${+(value * 100).toPrecision(3)}%`,
  },
  {
    id: "requests",
    nothing: "No requests seen yet.",
    title: "Requests",
    note: "a second, over 5 s",
    lines: (seen, service, look) =>
      service.versions.map((version, index) => ({
        name: version.name,
        text: words.perSecond,
        series: seen.version(version.name).requests,
        stroke: look.versions[index % COLOURS],
      })),
    range: (top) => [0, Math.max(1, top * 1.1)],
    axis: words.short,
  },
  {
    id: "evidence",
    nothing: "No verdict: no rollout has begun.",
    title: "Evidence",
    note: "logarithmic; counts at its bound",
    marked: true,
    log: true,
    lines: (seen, service, look) => [
      { name: "worse", text: words.evidence, series: seen.evidence, stroke: look.bad },
      { name: "fine", text: words.evidence, series: seen.passEvidence, stroke: look.good, dash: [2, 2] },
    ],
    bounds: ({ verdict }, look) =>
      verdict
        ? [
            { value: verdict.bound, text: `${words.evidence(verdict.bound)}: fail`, fill: look.bad },
            { value: verdict.passBound, text: `${words.evidence(verdict.passBound)}: pass`, fill: look.good },
          ].filter(({ value }) => value > 0)
        : [],
    // Far beyond the bound nothing is to be seen any more.
    range: (top) => [FLOOR, Math.max(1, top) * 10],
    axis: words.short,
  },
];

/** One plot: a heading, a legend with the values under the cursor or the last ones, and the canvas. */
class Plot {
  #kind;
  #canvas;
  #legend;
  #empty;
  #plot = null;
  #shape = "";
  #drawn = "";
  #look;
  #now = null;

  constructor(kind) {
    this.#kind = kind;
    this.#canvas = make("div", { class: "canvas", role: "img", tabindex: 0 });
    this.#legend = make("ul", { class: "legend" });
    this.#empty = make("p", { class: "nothing" }, kind.nothing);
    this.element = make(
      "section",
      { class: "plot", "data-plot": kind.id },
      make("h4", {}, kind.title, make("small", {}, ` ${kind.note}`)),
      this.#legend,
      make("div", { class: "frame" }, this.#canvas, this.#empty),
    );
    this.#canvas.addEventListener("keydown", (event) => this.#move(event));
    this.#canvas.addEventListener("blur", () => this.#plot?.setCursor({ left: -10, top: -10 }));
    this.watch = new ResizeObserver(() => this.#fit());
    this.watch.observe(this.#canvas);
  }

  end() {
    this.watch.disconnect();
    this.#plot?.destroy();
    this.#plot = null;
  }

  /** Redraws everything in the current colours. */
  repaint() {
    this.#shape = "";
    if (this.#now) this.update(...this.#now);
  }

  update(service, record, seconds, told) {
    this.#now = [service, record, seconds, told];
    const kind = this.#kind;
    const seen = record.service(service.name);
    if (!seen) return;
    if (!this.#look || this.#shape === "") this.#look = theme();
    const lines = kind.lines(seen, service, this.#look);
    const length = reach(record, seen, seconds);
    const values = lines.map(({ series }) => record.values(series, length));
    const shape = JSON.stringify(lines.map(({ name, stroke }) => [name, stroke]));
    this.lines = lines;
    this.values = values;
    const marks = both(seen.marks, told);
    this.marks = kind.marked ? marks : marks.map(({ at }) => ({ at, text: "" }));
    this.bounds = kind.bounds?.(service, this.#look) ?? [];
    this.#empty.hidden = values.some((one) => one.some((value) => value !== null));
    const [floor, ceiling] = kind.log ? kind.range(this.#top()) : [-Infinity, Infinity];
    const within = (value) => (value === null ? null : Math.min(Math.max(value, floor), ceiling));
    const data = [record.times(length), ...(kind.stacked ? stack(values) : values.map((one) => one.map(within)))];
    // Several statuses a second are drawn as one.
    const drawn = `${record.last} ${length} ${record.filled}`;
    if (shape !== this.#shape) this.#build(shape, data);
    else if (drawn !== this.#drawn) this.#plot?.setData(data);
    this.#drawn = drawn;
    this.#tell();
  }

  /** What must be seen: the bounds, where there are any, else the highest value. */
  #top() {
    if (this.bounds.length) return Math.max(...this.bounds.map(({ value }) => value));
    return this.values.flat().reduce((top, value) => Math.max(top, value ?? 0), 0);
  }

  #build(shape, data) {
    const width = this.#canvas.clientWidth;
    this.#plot?.destroy();
    this.#plot = null;
    if (!width) return;
    this.#shape = shape;
    this.#plot = new uPlot(this.#options(width), data, this.#canvas);
  }

  #fit() {
    const width = this.#canvas.clientWidth;
    if (!width) return;
    if (this.#plot) this.#plot.setSize({ width, height: HEIGHT });
    else if (this.#now) this.update(...this.#now);
  }

  #options(width) {
    const kind = this.#kind;
    const look = this.#look;
    const axis = { stroke: look.muted, font: look.font, ticks: { show: false }, grid: { stroke: look.line, width: 1 } };
    const lines = this.lines;
    return {
      width,
      height: HEIGHT,
      padding: [kind.marked ? 18 : 6, LABELS, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "time", setSeries: false }, drag: { x: false, y: false }, y: false, points: { size: 6 } },
      scales: {
        x: { time: true },
        y: { distr: kind.log ? 3 : 1, range: () => kind.range(this.#top()) },
      },
      axes: [
        {
          ...axis,
          size: 22,
          gap: 4,
          space: 64,
          values: (_, splits, _axis, _space, increment) => splits.map((at) => words.clock(at * 1000, increment < 60)),
        },
        { ...axis, size: 40, gap: 4, space: 28, splits: kind.log ? decades : undefined, values: (_, splits) => splits.map((value) => (value === null ? "" : kind.axis(value))) },
      ],
      series: [
        {},
        ...lines.map(({ name, stroke, dash }) => ({
          label: name,
          stroke: kind.stacked ? look.surface : stroke,
          width: kind.stacked ? 1.5 : 1.75,
          dash,
          points: { show: false },
          fill: kind.stacked ? `${stroke}a8` : undefined,
          paths: kind.stacked ? uPlot.paths.stepped({ align: 1 }) : undefined,
        })),
      ],
      // Each share is filled down to the one below it.
      bands: kind.stacked ? lines.slice(1).map((_, index) => ({ series: [index + 2, index + 1] })) : undefined,
      hooks: {
        draw: [
          (plot) => {
            marks(plot, this.marks, look);
            for (const { value, text, fill } of this.bounds) bound(plot, value, text, fill, look);
            labels(plot, lines.map(({ name, stroke }, index) => this.#place(plot, name, stroke, index)), look.surface);
          },
        ],
        setCursor: [() => this.#tell()],
      },
    };
  }

  /** Where a line's name goes: at its end, or beside the middle of its band. */
  #place(plot, text, fill, index) {
    const values = plot.data[index + 1];
    const at = values.findLastIndex((value) => value !== null);
    if (at < 0) return null;
    const below = this.#kind.stacked && index > 0 ? plot.data[index][at] : 0;
    if (this.#kind.stacked && values[at] - below < 0.05) return null;
    const value = this.#kind.stacked ? (values[at] + below) / 2 : values[at];
    const x = plot.valToPos(plot.data[0][at], "x", true);
    return { text, fill, font: this.#look.bold, x, y: plot.valToPos(value, "y", true) };
  }

  #move(event) {
    const plot = this.#plot;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!plot || !step) return;
    event.preventDefault();
    const end = plot.data[0].length - 1;
    const at = Math.min(end, Math.max(0, (plot.cursor.idx ?? end) + step * (event.shiftKey ? 10 : 1)));
    plot.setCursor({ left: plot.valToPos(plot.data[0][at], "x"), top: 10 });
  }

  #tell() {
    const lines = this.lines ?? [];
    const at = this.#plot?.cursor.left >= 0 ? this.#plot.cursor.idx : null;
    const values = lines.map((_, index) => this.values[index].at(at ?? -1));
    const said = lines.map((line, index) => ({ ...line, value: line.text(values[index]) }));
    each(this.#legend, said, ({ name }) => name, () => {
      const swatch = make("span", { class: "swatch" });
      const name = make("span", { class: "name" });
      const value = make("b");
      return {
        element: make("li", {}, swatch, name, value),
        update: (line) => {
          style(swatch, "background-color", line.stroke);
          say(name, line.name);
          say(value, line.value);
        },
      };
    });
    const when = at === null || at === undefined ? "now" : `at ${words.clock(this.#plot.data[0][at] * 1000)}`;
    set(this.#canvas, "aria-label", `${this.#kind.title}, ${when}: ${said.map(({ name, value }) => `${name} ${value}`).join(", ")}`);
  }
}

/** Where a logarithmic axis has its lines: at powers of ten, not too many. */
function decades(_plot, _axis, from, to) {
  const [first, last] = [Math.ceil(Math.log10(from) - 1e-9), Math.floor(Math.log10(to) + 1e-9)];
  const step = Math.max(1, Math.ceil((last - first) / 6));
  return Array.from({ length: Math.floor((last - first) / step) + 1 }, (_, index) => 10 ** (first + index * step));
}

/** Each version's share on top of those before it. */
function stack(values) {
  let below = null;
  return values.map((one) => {
    below = one.map((value, at) => (value === null ? null : value + (below?.[at] ?? 0)));
    return below;
  });
}

const drawn = new Set();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const plot of drawn) plot.repaint();
});

/** The plots of a service; `ids` says which, if not all. */
export function plots(ids) {
  const all = KINDS.filter(({ id }) => !ids || ids.includes(id)).map((kind) => new Plot(kind));
  for (const plot of all) drawn.add(plot);
  return {
    element: make("div", { class: "plots" }, ...all.map((plot) => plot.element)),
    /** `told` are marks, `{at (seconds), text}`, of what happened before it was seen. */
    update: (service, record, seconds, told) => {
      for (const plot of all) plot.update(service, record, seconds, told);
    },
    end: () => {
      for (const plot of all) {
        plot.end();
        drawn.delete(plot);
      }
    },
  };
}
