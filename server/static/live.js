// What this server is doing, out of its own metrics.

import { getText } from "./api.js";
import { byId, element, figures, milliseconds, percent, points } from "./dom.js";

const EVERY_MS = 2000;
const WINDOW_MS = 60_000;
const SERIES = /^offramp_(\w+?)(?:\{(.*)\})? ([^ ]+)$/gm;
const LABEL = /(\w+)="([^"]*)"/g;

let snapshots = [];

/** Keep the figures moving while the page is looked at. */
export async function follow() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

async function refresh() {
  let now;
  try {
    now = { at: Date.now(), ...read(await getText("metrics")) };
  } catch {
    byId("live-window").textContent = "does not answer";
    snapshots = [];
    return;
  }
  snapshots = [...snapshots.filter((s) => now.at - s.at < WINDOW_MS), now];
  show(now, snapshots[0]);
}

/** What this page wants of the exposition. */
function read(text) {
  const found = { answers: {}, buckets: {}, macs: {}, jobs: 0, point: 0 };
  for (const [, name, labels, value] of text.matchAll(SERIES)) {
    const label = Object.fromEntries([...(labels ?? "").matchAll(LABEL)].map(([, k, v]) => [k, v]));
    const number = Number(value.replace("Inf", "Infinity"));
    if (name === "answers_total") add(found.answers, label.exit, number);
    if (name === "answer_duration_seconds_bucket") {
      add((found.buckets[label.exit] ??= {}), label.le, number);
    }
    if (name === "macs_total") add(found.macs, label.kind, number);
    if (name === "in_flight_jobs") found.jobs = number;
    if (name === "operating_point") found.point = number;
  }
  return found;
}

function add(sums, key, number) {
  sums[key] = (sums[key] ?? 0) + number;
}

const total = (sums) => Object.values(sums).reduce((sum, n) => sum + n, 0);

function minus(now, then) {
  return Object.fromEntries(Object.entries(now).map(([k, n]) => [k, n - (then[k] ?? 0)]));
}

function show(now, first) {
  const recent = minus(now.answers, first.answers);
  const lately = total(recent) > 0;
  const then = lately ? first : { answers: {}, buckets: {}, macs: {} };
  const mix = minus(now.answers, then.answers);
  const buckets = Object.fromEntries(
    Object.keys(mix).map((exit) => [exit, minus(now.buckets[exit], then.buckets[exit] ?? {})]),
  );
  const all = {};
  for (const row of Object.values(buckets)) for (const [le, n] of Object.entries(row)) add(all, le, n);
  const macs = minus(now.macs, then.macs);
  const seconds = Math.max(1, (now.at - first.at) / 1000);
  const answers = total(mix);
  byId("live-window").textContent = answers ? (lately ? "in the last minute" : "since its start") : "";
  figures(byId("live"), [
    ["answers a second", lately ? (total(recent) / seconds).toFixed(1) : "0"],
    ["median time", answers ? milliseconds(1000 * quantile(all, 0.5)) : "–"],
    ["95 % are within", answers ? milliseconds(1000 * quantile(all, 0.95)) : "–"],
    ["compute saved", answers ? percent(1 - macs.spent / macs.full) : "–"],
  ]);
  showMix(mix, buckets, answers);
  byId("in-force").textContent =
    (now.point === 1
      ? "In force now: first exits only, since the server is overloaded."
      : `In force now: at most ${points(now.point)} of accuracy at stake.`) +
    ` ${now.jobs} ${now.jobs === 1 ? "image" : "images"} in flight.`;
}

function showMix(mix, buckets, answers) {
  const exits = Object.keys(mix).sort((a, b) => a - b);
  const shares = exits.map((k) => (answers ? mix[k] / answers : 0));
  const tone = (i) => ({ "--depth": exits.length > 1 ? i / (exits.length - 1) : 0 });
  byId("mix").replaceChildren(
    ...shares.map((share, i) => element("i.tone", { ...tone(i), "--share": share })),
  );
  byId("mix-legend").replaceChildren(
    ...exits.map((k, i) =>
      element("li.tone", tone(i),
        element("span", {}, `Exit ${k}`),
        element("span", {}, percent(shares[i])),
        element("span.time", {}, shares[i] ? `median ${milliseconds(1000 * quantile(buckets[k], 0.5))}` : ""),
      )),
  );
  byId("mix").setAttribute("aria-label",
    answers ? exits.map((k, i) => `exit ${k}: ${percent(shares[i])}`).join(", ") : "No answers yet");
}

/** A quantile of a Prometheus histogram, linear within a bucket. */
function quantile(buckets, q) {
  const rows = Object.entries(buckets)
    .map(([le, n]) => [le === "+Inf" ? Infinity : Number(le), n])
    .sort((a, b) => a[0] - b[0]);
  const rank = q * rows.at(-1)[1];
  let [below, before] = [0, 0];
  for (const [le, n] of rows) {
    if (n >= rank) return le === Infinity ? below : below + ((le - below) * (rank - before)) / (n - before || 1);
    [below, before] = [le, n];
  }
  return below;
}
