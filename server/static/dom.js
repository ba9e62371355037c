// Elements and numbers as people read them.

export const byId = (id) => document.getElementById(id);

/** An element: its tag with classes (`p.small`), properties or attributes, and children. */
export function element(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  made.classList.add(...classes);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("--")) made.style.setProperty(key, value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** The same for SVG. */
export function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Figures in a definition list: pairs of what it is and how much. */
export function figures(list, pairs) {
  list.replaceChildren(
    ...pairs.map(([what, much]) =>
      element("div", {}, element("dt", {}, what), element("dd", {}, much))),
  );
}

export const readable = (label) => label.replaceAll("_", " ");
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.01 ? 1 : 0)} %`;
export const milliseconds = (ms) => `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;

/** An accuracy difference, in percentage points. */
export function points(share) {
  const number = Number((100 * share).toFixed(2));
  return `${number} ${Math.abs(number) === 1 ? "point" : "points"}`;
}
