// Words and numbers for people.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const ONE = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const TWO_DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const THREE_DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 2 });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const CLOCK_SHORT = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** What stands where nothing is known. */
export const UNKNOWN = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** `12,345`. */
export const count = (value) => (known(value) ? WHOLE.format(value) : UNKNOWN);

/** A share in percent: `25 %`, `33.3 %`. */
export const percent = (value) => (known(value) ? `${ONE.format(value)}\u00a0%` : UNKNOWN);

/** A ratio from 0 to 1 as a rate in percent, to two digits: `1.7 %`, `0.03 %`. */
export const rate = (value) => (known(value) ? `${TWO_DIGITS.format(value * 100)}\u00a0%` : UNKNOWN);

/** How many a second: `12.3/s`. */
export const perSecond = (value) => (known(value) ? `${THREE_DIGITS.format(value)}/s` : UNKNOWN);

/** How likely chance alone shows as much against a version. */
export function odds(evidence, bound) {
  if (evidence < 10) return "no sign of it";
  return `by chance in fewer than 1 of ${plain(evidence)}, taken back at 1 of ${plain(bound)}`;
}

/** How sure it is that a version is good enough, in percent, of how sure it has to be. */
export function sureness(evidence, bound) {
  const percent = (value) => (value > 1 ? 100 * (1 - 1 / value) : 0);
  return `${Math.floor(percent(evidence))} of ${Math.round(percent(bound) * 100) / 100} % sure`;
}

/** Rounded down, so that nothing looks as if it had reached its bound. */
const plain = (value) => Math.floor(Math.min(value, 1e6)).toLocaleString("en-US");

/** Evidence: `0.4`, `2,300`. */
export function evidence(value) {
  if (!known(value)) return UNKNOWN;
  if (value >= 1e6) return "over a million";
  if (value < 0.001) return value > 0 ? "under 0.001" : "0";
  return (value < 1000 ? TWO_DIGITS : THREE_DIGITS).format(value);
}

/** A number on a narrow axis: `0.1`, `1K`. */
export const short = (value) => SHORT.format(value);

/** A span of seconds: `8 s`, `3 min 20 s`, `2 h 5 min`, `3 d`. */
export function span(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const both = (large, unit, rest, small) => (rest ? `${large}\u00a0${unit} ${rest}\u00a0${small}` : `${large}\u00a0${unit}`);
  if (whole < 60) return `${whole}\u00a0s`;
  if (whole < 3600) return both(Math.floor(whole / 60), "min", whole % 60, "s");
  if (whole < 86_400) return both(Math.floor(whole / 3600), "h", Math.floor((whole % 3600) / 60), "min");
  return both(Math.floor(whole / 86_400), "d", Math.floor((whole % 86_400) / 3600), "h");
}

/** `12 of 60 s`, `1 min 5 s of 10 min`. */
export function heldOf(held, whole) {
  const so_far = Math.min(held, whole);
  return whole <= 120 ? `${count(so_far)} of ${count(whole)}\u00a0s` : `${span(so_far)} of ${span(whole)}`;
}

/** How long before `now` (milliseconds) an RFC 3339 time was. */
export function ago(time, now) {
  const at = Date.parse(time);
  if (Number.isNaN(at)) return UNKNOWN;
  return now - at < 2000 ? "just now" : `${span((now - at) / 1000)} ago`;
}

/** The time of day of milliseconds. */
export const clock = (at, withSeconds = true) => (withSeconds ? CLOCK : CLOCK_SHORT).format(at);

/** An RFC 3339 time, whole. */
export function date(time) {
  const at = Date.parse(time);
  return Number.isNaN(at) ? String(time) : DAY.format(at);
}

/** `4 of 4 endpoints ready`. */
export function ready({ endpoints }) {
  return `${count(endpoints.ready)} of ${count(endpoints.listed)} endpoint${endpoints.listed === 1 ? "" : "s"} ready`;
}

/** `1 proxy`, `2 proxies`. */
export const plural = (number, one, many) => `${count(number)} ${number === 1 ? one : many}`;
