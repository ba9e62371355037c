// The demo page: an image in, its exits and its answer out.

import { classify, getJson, setKey } from "./api.js";
import { alike, draw, ladder } from "./curve.js";
import { byId, element, milliseconds, percent, readable } from "./dom.js";
import { follow } from "./live.js";
import { lay, leave, light } from "./road.js";

const SAMPLES = ["sunflower", "orange", "motorcycle", "butterfly", "castle", "fox", "tiger", "otter"];
const OPTIONS = ["threshold", "min_exit", "max_exit", "deadline_ms"];
const TINY = 64;
const WHY = {
  confident: (a) => `sure enough at exit ${a.exit} of ${a.exits}`,
  final: (a) => `decided at the last of ${a.exits} exits`,
  deadline: (a) => `the best answer by the deadline, from exit ${a.exit} of ${a.exits}`,
  overload: (a) => `the server is busy, so exit ${a.exit} of ${a.exits} had to do`,
  max_exit: (a) => `exit ${a.exit} of ${a.exits} was the deepest allowed`,
};

const state = { model: null, policy: null, steps: [], image: null, running: null };

// --- what is asked -------------------------------------------------------------------------------

function parameters() {
  const asked = {};
  for (const name of OPTIONS) if (byId(name).value !== "") asked[name] = byId(name).value;
  const step = state.steps[byId("point").value];
  const elsewhere = step && !alike(step, state.policy.in_force);
  if (elsewhere && !("threshold" in asked)) asked.max_accuracy_loss = step.max_accuracy_loss;
  return asked;
}

function threshold(exit) {
  if (byId("threshold").value !== "") return Number(byId("threshold").value);
  return state.steps[byId("point").value].thresholds[exit - 1] ?? 2;
}

// --- what happens to an image --------------------------------------------------------------------

async function run() {
  if (!state.image || !state.model) return;
  state.running?.abort();
  const mine = (state.running = new AbortController());
  const exits = state.model.exits;
  byId("error").hidden = true;
  document.body.classList.add("busy");
  lay(exits);
  try {
    const onExit = (seen) => light(exits[seen.exit - 1], seen, threshold(seen.exit));
    const answer = await classify(state.image, parameters(), onExit, mine.signal);
    leave(answer, exits);
    say(answer);
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  } finally {
    if (state.running === mine) document.body.classList.remove("busy");
  }
}

function say(answer) {
  const share = state.model.exits[answer.exit - 1].macs_share;
  const others = answer.top_k.slice(1, 3).map((o) => `${readable(o.label)} ${percent(o.probability)}`);
  const said = element("p.said", {}, `${readable(answer.label)} `);
  said.append(element("span.sure", {}, percent(answer.confidence)));
  const reason = element("span", {}, WHY[answer.reason](answer));
  reason.classList.toggle("flag", answer.degraded);
  const why = element("p.why");
  why.append(reason, ` · ${percent(share)} of the compute · ${milliseconds(answer.timing_ms.total)}`);
  if (others.length) why.append(element("br"), `or perhaps ${others.join(", ")}`);
  byId("answer").replaceChildren(said, why);
}

function fail(error) {
  byId("error-text").textContent = error.message;
  byId("retry").hidden = error.needsKey === true;
  byId("error").hidden = false;
  if (error.needsKey) askForKey();
  lay(state.model?.exits ?? []);
  byId("answer").replaceChildren(element("p.said", {}, "No answer"));
}

function take(image, sample = null) {
  if (!image) return;
  state.image = image;
  show(image);
  for (const button of byId("samples").children) {
    button.setAttribute("aria-pressed", String(button === sample));
  }
  run();
}

function show(image) {
  const preview = byId("preview");
  URL.revokeObjectURL(preview.src);
  preview.alt = image.name ? `Your image, ${image.name}` : "Your image";
  preview.src = URL.createObjectURL(image);
  preview.hidden = false;
}

// --- where images come from ----------------------------------------------------------------------

function offerSamples() {
  for (const name of SAMPLES) {
    const source = `static/samples/${name}.png`;
    const button = element("button", { type: "button", "aria-pressed": "false", title: name });
    button.append(element("img", { src: source, alt: `Sample: ${name}`, width: 32, height: 32 }));
    button.addEventListener("click", async () => {
      const data = await (await fetch(source)).blob();
      take(new File([data], `${name}.png`, { type: data.type }), button);
    });
    byId("samples").append(button);
  }
}

function listen() {
  const drop = byId("drop");
  byId("file").addEventListener("change", (event) => {
    take(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  for (const name of ["dragleave", "drop", "dragend"]) {
    document.addEventListener(name, () => drop.classList.remove("over"));
  }
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  byId("preview").addEventListener("load", ({ target }) => {
    target.classList.toggle("tiny", target.naturalWidth <= TINY);
  });
  byId("preview").addEventListener("error", ({ target }) => {
    target.hidden = true;
    byId("hint").textContent = "No preview of this image";
  });
  byId("point").addEventListener("input", () => draw(state.policy, state.steps[byId("point").value]));
  byId("point").addEventListener("change", run);
  byId("options").addEventListener("change", ({ target }) => target.checkValidity() && run());
  byId("retry").addEventListener("click", () => (state.model ? run() : start()));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(byId("key").value);
    byId("key-form").hidden = true;
    start();
  });
}

// --- what is served ------------------------------------------------------------------------------

function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

async function start() {
  byId("error").hidden = true;
  try {
    [state.model, state.policy] = await Promise.all([getJson("model"), getJson("policy")]);
  } catch (error) {
    fail(error);
    return;
  }
  introduce();
  if (state.image) run();
}

function introduce() {
  const { model, policy } = state;
  byId("model").textContent =
    `Serving ${model.name}, version ${model.version} · ${model.labels.length} labels · ` +
    `${model.exits.length} exits · ${model.device === "cpu" ? "CPU" : "GPU"}`;
  for (const name of ["min_exit", "max_exit"]) byId(name).max = model.exits.length;
  lay(model.exits);
  state.steps = ladder(policy);
  const slider = byId("point");
  slider.max = state.steps.length - 1;
  slider.value = state.steps.findIndex((p) => alike(p, policy.in_force));
  slider.disabled = false;
  draw(policy, state.steps[slider.value]);
}

offerSamples();
listen();
start();
follow();
