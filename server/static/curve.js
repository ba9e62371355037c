// Operating points on the calibration curve.

import { byId, figures, percent, points, shape } from "./dom.js";

const [LEFT, RIGHT, TOP, BOTTOM] = [44, 462, 12, 150];

/** Whether two operating points answer alike. */
export const alike = (a, b) => a.thresholds.join() === b.thresholds.join();

/** Operating points from the cheapest to the full network, as the slider counts them: of those
 * that answer alike, the one with the best bound. */
export function ladder(policy) {
  const points = policy.operating_points; // from the smallest loss to the largest
  return points
    .filter((p, i) => !points.slice(0, i).some((q) => alike(p, q)))
    .sort((a, b) => a.mean_macs - b.mean_macs || b.max_accuracy_loss - a.max_accuracy_loss);
}

/** Draw the curve with one point chosen, and say what is at stake there. */
export function draw(policy, chosen) {
  const steps = ladder(policy);
  const most = Math.max(...steps.map((p) => p.max_accuracy_loss)) || 0.01;
  const x = (share) => LEFT + share * (RIGHT - LEFT);
  const y = (loss) => BOTTOM - (Math.max(0, loss) / most) * (BOTTOM - TOP);
  const at = steps.map((p) => [x(p.mean_macs), y(p.max_accuracy_loss)]);
  const path = at.map(([px, py]) => `${px} ${py}`).join(" L ");
  const [cx, cy] = at[steps.indexOf(chosen)];
  byId("curve").replaceChildren(
    ...axes(x, y, most),
    shape("path", { class: "area", d: `M ${path} V ${BOTTOM} H ${at[0][0]} Z` }),
    shape("path", { class: "line", d: `M ${path}` }),
    shape("path", { class: "guide", d: `M ${LEFT} ${cy} H ${cx} V ${BOTTOM}` }),
    ...steps.map((p) =>
      shape("circle", { class: "measured", r: 2, cx: x(p.mean_macs), cy: y(p.measured_accuracy_loss) })),
    ...at.map(([px, py]) => shape("circle", { class: "dot", r: 4, cx: px, cy: py })),
    shape("circle", { class: "dot chosen", r: 7, cx, cy }),
  );
  describe(policy, chosen, steps);
}

function axes(x, y, most) {
  const compute = [0, 0.25, 0.5, 0.75, 1];
  const losses = [0, most / 2, most];
  return [
    ...losses.map((l) => shape("path", { class: "grid", d: `M ${LEFT} ${y(l)} H ${RIGHT}` })),
    ...losses.map((l) =>
      shape("text", { x: LEFT - 8, y: y(l) + 4, "text-anchor": "end" }, Number((100 * l).toFixed(2)))),
    ...compute.map((c) =>
      shape("text", { x: x(c), y: BOTTOM + 17, "text-anchor": "middle" }, percent(c))),
    shape("text", { x: (LEFT + RIGHT) / 2, y: BOTTOM + 35, "text-anchor": "middle" },
      "mean compute, of the full network’s"),
    shape("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(11 ${(TOP + BOTTOM) / 2}) rotate(-90)` },
      "points at stake"),
  ];
}

function describe(policy, chosen, steps) {
  figures(byId("stake"), [
    ["of accuracy at stake", `≤ ${points(chosen.max_accuracy_loss)}`],
    ["of the compute, on average", percent(chosen.mean_macs)],
  ]);
  const images = policy.calibration_images.toLocaleString("en");
  const lost = chosen.measured_accuracy_loss;
  const holds = chosen.certified
    ? `The bound holds with probability ${percent(1 - policy.delta)}.`
    : "This bound is not certified.";
  byId("guarantee").textContent =
    `${holds} Measured on ${images} calibration images: ${points(Math.abs(lost))} ` +
    `${lost < 0 ? "gained" : "lost"} (small grey dots).`;
  byId("curve-text").textContent =
    "Accuracy at stake over mean compute: " +
    steps.map((p) => `${percent(p.mean_macs)} of the compute, ${points(p.max_accuracy_loss)}`).join("; ") + ".";
  byId("point").setAttribute("aria-valuetext",
    `at most ${points(chosen.max_accuracy_loss)} of accuracy, ${percent(chosen.mean_macs)} of the compute`);
}
