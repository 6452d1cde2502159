// The history of the plots: what the page has seen, and the controller's series of the time before. One value per second
// for at most 15 minutes. Seconds without data are gaps.

/** How many seconds are kept. */
export const KEEP = 900;
/** Rates are over so many milliseconds: proxies report each second, and one second alone would jump. */
const WINDOW = 5000;
/** A status may be so many seconds after the one before without a gap between the two. */
const BRIDGED = 3;
/** A rate over less says nothing. */
const LEAST = 900;
const TOGETHER = 500;
/** All proxies report within so many milliseconds of the first one. */
const SETTLING = 1500;
const MARKS = 100;

const empty = () => new Float32Array(KEEP).fill(NaN);

/** A version's counts over the last seconds. */
class Counts {
  #seen = [];
  #unsettled = 0;

  /** After a new connection: a controller that was away hears all at once what was counted meanwhile. */
  anew() {
    this.#seen = [];
    this.#unsettled = Infinity;
  }

  take(at, requests) {
    const judged = requests.ok + requests.error + requests.clientError;
    const now = { at, all: judged + requests.cancelled, judged, errors: requests.error };
    const last = this.#seen.at(-1);
    // Decreasing counts restart the rate; so does a gap, because a rate over a gap would flatten what happened in it.
    if (last && (now.all < last.all || at - last.at > WINDOW)) this.#seen = [];
    if (last && now.all > last.all && at < this.#unsettled) {
      this.#seen = [];
      this.#unsettled = Math.min(this.#unsettled, at + SETTLING);
    }
    const before = this.#seen.at(-2);
    // Several a second count as one, also when they come all at once after a silence.
    if (before && at - before.at < TOGETHER) this.#seen.pop();
    if (this.#seen.length === 1 && at - this.#seen[0].at < TOGETHER) this.#seen[0] = { ...now, at: this.#seen[0].at };
    else this.#seen.push(now);
    while (this.#seen.length > 2 && at - this.#seen[1].at >= WINDOW) this.#seen.shift();
  }

  /** Requests a second, and the errors' share of those that were not cancelled; NaN where unknown. */
  rates() {
    const [first, last] = [this.#seen[0], this.#seen.at(-1)];
    if (!first || last.at - first.at < LEAST) return { requests: NaN, errors: NaN };
    const judged = last.judged - first.judged;
    return {
      requests: (last.all - first.all) / ((last.at - first.at) / 1000),
      errors: judged > 0 ? (last.errors - first.errors) / judged : NaN,
    };
  }
}

/** One service as it was seen. */
class Seen {
  /** The first second that anything is known of. */
  first;
  versions = new Map();
  evidence = empty();
  passEvidence = empty();
  /** What changed and when: `{at (seconds), text}`. */
  marks = [];
  #last = null;
  #held = 0;

  constructor(first) {
    this.first = first;
  }

  /** A version's plots: `share` in percent, `requests` a second, `errors` from 0 to 1. */
  version(name) {
    if (!this.versions.has(name)) {
      const version = { share: empty(), requests: empty(), errors: empty(), counts: new Counts() };
      this.versions.set(name, version);
    }
    return this.versions.get(name);
  }

  all() {
    const versions = [...this.versions.values()];
    return [this.evidence, this.passEvidence, ...versions.flatMap((one) => [one.share, one.requests, one.errors])];
  }

  /** Takes from `past`, which knows the seconds from `from` to `to`, what is not known here up to `last`. */
  fill(past, from, to, last) {
    this.#held = to + BRIDGED;
    const pairs = [[this.evidence, past.evidence], [this.passEvidence, past.passEvidence]];
    for (const [name, version] of past.versions) {
      const own = this.versions.get(name);
      if (own) pairs.push(...["share", "requests", "errors"].map((one) => [own[one], version[one]]));
    }
    for (const [own, other] of pairs) {
      for (let time = from; time <= Math.min(last, this.#held); time++) {
        if (!Number.isNaN(own[time % KEEP])) continue;
        own[time % KEEP] = other[Math.min(time, to) % KEEP];
        if (!Number.isNaN(own[time % KEEP])) this.first = Math.min(this.first, time);
      }
    }
  }

  /** A value for this second; until there is one, what was filled in holds for a little while. */
  put(values, second, value) {
    const isHeld = Number.isNaN(value) && second <= this.#held;
    values[second % KEEP] = isHeld ? values[(second - 1) % KEEP] : value;
  }

  mark(at, service) {
    const step = service.step ? `${service.step.weight}\u00a0%` : "";
    const next = { phase: service.phase, step: service.step?.number, target: service.target };
    const last = this.#last;
    this.#last = next;
    if (!last) return;
    if (next.phase !== last.phase && next.phase !== "Progressing") this.marks.push({ at, text: next.phase });
    else if (next.target !== last.target && next.target) this.marks.push({ at, text: `to ${next.target}` });
    else if (next.step && next.step !== last.step) this.marks.push({ at, text: step });
    this.marks = this.marks.filter((mark) => mark.at > at - KEEP).slice(-MARKS);
  }
}

export class Record {
  /** The second of the last status; `null` before the first. */
  last = null;
  /** How often something of the past was filled in. */
  filled = 0;
  #services = new Map();

  /** Takes a status that was heard at `now` (milliseconds). */
  take(status, now) {
    const second = Math.floor(now / 1000);
    if (this.last !== null && second < this.last) this.#services.clear();
    const from = this.last === null ? second : Math.max(this.last + 1, second - KEEP + 1);
    const names = new Set(status.services.map((service) => service.name));
    for (const [name, seen] of this.#services) {
      if (!names.has(name)) this.#services.delete(name);
      else for (const values of seen.all()) this.#bridge(values, from, second);
    }
    this.last = second;
    const slot = second % KEEP;
    for (const service of status.services) {
      const seen = this.#services.get(service.name) ?? new Seen(second);
      this.#services.set(service.name, seen);
      for (const name of seen.versions.keys()) {
        if (!service.versions.some((version) => version.name === name)) seen.versions.delete(name);
      }
      for (const version of service.versions) {
        const values = seen.version(version.name);
        values.counts.take(now, version.requests);
        const rates = values.counts.rates();
        values.share[slot] = version.weight;
        seen.put(values.requests, second, rates.requests);
        seen.put(values.errors, second, rates.errors);
      }
      seen.evidence[slot] = service.verdict?.evidence ?? NaN;
      seen.passEvidence[slot] = service.verdict?.passEvidence ?? NaN;
      seen.mark(second, service);
    }
  }

  /** There is a new connection: what was counted in between may arrive late. */
  anew() {
    for (const seen of this.#services.values()) {
      for (const version of seen.versions.values()) version.counts.anew();
    }
  }

  /** Fills gaps with what the controller kept of the last minutes, which was heard at `heard` (milliseconds). */
  fill({ now, times, services }, heard) {
    if (this.last === null || times.length === 0) return;
    const skew = Date.parse(now) - heard;
    const past = new Record();
    const at = times.map((time) => Date.parse(time) - skew);
    at.forEach((time, index) => past.take({ services: services.map((service) => sample(service, index)) }, time));
    const from = Math.max(Math.floor(at[0] / 1000), this.last - KEEP + 1, past.last - KEEP + 1);
    const to = Math.min(past.last, this.last);
    for (const { name } of services) this.#services.get(name)?.fill(past.service(name), from, to, this.last);
    this.filled++;
  }

  #bridge(values, from, second) {
    const held = second - this.last <= BRIDGED ? values[this.last % KEEP] : NaN;
    for (let gap = from; gap < second; gap++) values[gap % KEEP] = held;
    values[second % KEEP] = NaN;
  }

  /** What was seen of a service; `undefined` for one that is not there. */
  service(name) {
    return this.#services.get(name);
  }

  /** A version's rates now: `requests` a second and `errors` from 0 to 1; NaN where unknown. */
  rates(service, version) {
    return this.#services.get(service)?.version(version).counts.rates() ?? { requests: NaN, errors: NaN };
  }

  /** The last so many seconds, the last heard one at the end. */
  times(seconds) {
    return Array.from({ length: seconds }, (_, index) => this.last - seconds + 1 + index);
  }

  /** The values of these seconds; `null` is a gap. */
  values(series, seconds) {
    return this.times(seconds).map((time) => {
      const value = time < 0 ? NaN : series[time % KEEP];
      return Number.isNaN(value) ? null : value;
    });
  }
}

/** A service as it stood at one of its samples, as a status would say it. */
function sample({ name, evidence, passEvidence, versions }, index) {
  const there = versions.filter(({ weight }) => weight[index] !== null);
  return {
    name,
    verdict: { evidence: evidence[index] ?? NaN, passEvidence: passEvidence[index] ?? NaN },
    versions: there.map(({ name, weight, requests, errors, cancelled }) => {
      const ok = requests[index] - errors[index];
      return { name, weight: weight[index], requests: { ok, error: errors[index], clientError: 0, cancelled: cancelled[index] } };
    }),
  };
}
