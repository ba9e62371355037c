// The exits of the network as a road with a row for each.

import { byId, element, milliseconds, percent, readable } from "./dom.js";

/** Draw every exit as not yet reached. */
export function lay(exits) {
  byId("road").replaceChildren(
    ...exits.map((exit) => {
      const accuracy = exit.accuracy === null ? "" : `right ${percent(exit.accuracy)} of the time`;
      return row(exit, "", [element("span.label.dim", {}, accuracy), numbers(null, exit)]);
    }),
  );
}

/** Light an exit up with what it said; `threshold` is what would have sufficed. */
export function light(exit, seen, threshold) {
  const children = [
    element("span.label", {}, readable(seen.label)),
    numbers(seen, exit),
    bar(seen.confidence, threshold),
  ];
  byId("road").children[exit.exit - 1].replaceWith(row(exit, "reached", children));
}

/** Mark where the answer came from, and that what lies beyond was not needed. */
export function leave(answer, exits) {
  byId("road").children[answer.exit - 1].classList.add("left");
  for (const exit of exits.slice(answer.exit)) {
    const children = [element("span.label.dim", {}, "not needed"), numbers(null, exit)];
    byId("road").children[exit.exit - 1].replaceWith(row(exit, "", children));
  }
}

function row(exit, state, children) {
  const made = element("li.exit", { "--step": exit.exit - 1 });
  if (state) made.classList.add(state);
  made.append(element("span.name", {}, `Exit ${exit.exit}`), ...children);
  return made;
}

function numbers(seen, exit) {
  const compute = element("span", { title: "share of the full network's compute" });
  compute.append(percent(exit.macs_share), element("span.unseen", {}, " of the compute"));
  const made = element("span.numbers");
  if (seen) {
    const sure = element("span", {}, percent(seen.confidence));
    sure.append(element("span.unseen", {}, " sure"));
    made.append(sure, element("span", {}, milliseconds(seen.elapsed_ms)));
  }
  made.append(compute);
  return made;
}

function bar(confidence, threshold) {
  const made = element("div.bar", { "aria-hidden": "true" });
  made.append(element("div.fill", { "--share": confidence }));
  if (threshold <= 1) {
    made.append(element("div.tick", { "--at": threshold, title: `suffices: ${percent(threshold)}` }));
  }
  return made;
}
