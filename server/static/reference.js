// The OpenAPI document as a page.

import { byId, element } from "./dom.js";

const METHODS = ["get", "put", "post", "delete", "options", "head", "patch"];
const anchor = (method, path) => `${method}${path.replace(/[^a-z0-9]+/gi, "-")}`;

/** Text with `code` in backquotes. */
function prose(text = "") {
  return text.split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));
}

function paragraphs(text = "") {
  return text.split(/\n\s*\n/).filter(Boolean).map((p) => element("p", {}, ...prose(p)));
}

function table(headings, rows) {
  const head = element("tr", {}, ...headings.map((h) => element("th", { scope: "col" }, h)));
  const body = rows.map((cells) =>
    element("tr", {}, ...cells.map((cell) => element("td", {}, ...[cell].flat()))));
  return element("div.scroll", { tabindex: "0" }, element("table", {},
    element("thead", {}, head), element("tbody", {}, ...body)));
}

class Reference {
  constructor(document) {
    this.document = document;
  }

  resolve(schema) {
    if (!schema?.$ref) return schema ?? {};
    return this.resolve(schema.$ref.slice(2).split("/").reduce((at, key) => at[key], this.document));
  }

  /** A schema's type in a few words. */
  type(schema) {
    const name = schema.$ref?.split("/").at(-1);
    const { type, anyOf, oneOf, enum: values, const: value, items, format } = this.resolve(schema);
    const any = anyOf ?? oneOf;
    if (any) return any.filter((s) => s.type !== "null").map((s) => this.type(s)).join(" or ");
    if (values) return values.map((v) => JSON.stringify(v)).join(", ");
    if (value !== undefined) return JSON.stringify(value);
    if (type === "array") return `list of ${this.type(items ?? {})}`;
    if (name) return name;
    return format === "binary" ? "bytes" : (type ?? "anything");
  }

  range(schema) {
    const found = this.resolve(schema);
    const s = found.anyOf?.find((one) => one.type !== "null") ?? found;
    const words = [];
    if (s.minimum !== undefined) words.push(`≥ ${s.minimum}`);
    if (s.exclusiveMinimum !== undefined) words.push(`> ${s.exclusiveMinimum}`);
    if (s.maximum !== undefined) words.push(`≤ ${s.maximum}`);
    if (found.default !== undefined && found.default !== null) words.push(`default ${found.default}`);
    return words.join(", ");
  }

  fields(schema) {
    const { properties = {} } = this.resolve(schema);
    return table(["Field", "Type", "Meaning"], Object.entries(properties).map(([name, one]) => [
      element("code", {}, name),
      [this.type(one), this.range(one)].filter(Boolean).join(", "),
      prose(one.description ?? this.resolve(one).description),
    ]));
  }

  parameters(operation) {
    const rows = (operation.parameters ?? []).map((p) => [
      element("code", {}, p.name),
      [this.type(p.schema), this.range(p.schema)].filter(Boolean).join(", "),
      prose(p.description),
    ]);
    return rows.length ? [element("h3", {}, "Parameters"), table(["Name", "Type", "Meaning"], rows)] : [];
  }

  body(operation) {
    const content = Object.entries(operation.requestBody?.content ?? {});
    if (!content.length) return [];
    const rows = content.map(([type, { schema }]) => {
      const { properties } = this.resolve(schema);
      const parts = Object.entries(properties ?? {}).map(([n, s]) => `${n}: ${this.type(s)}`);
      return [element("code", {}, type), parts.join(", ") || this.type(schema)];
    });
    return [
      element("h3", {}, "Body"),
      ...paragraphs(operation.requestBody.description),
      table(["Content type", "Holds"], rows),
    ];
  }

  responses(operation) {
    const rows = Object.entries(operation.responses).map(([status, one]) => [
      element("code", {}, status),
      prose(this.resolve(one).description),
      Object.keys(this.resolve(one).content ?? {}).join(", "),
    ]);
    return [element("h3", {}, "Responses"), table(["Status", "When", "Content"], rows), ...this.details(operation)];
  }

  details(operation) {
    const made = [];
    for (const [status, response] of Object.entries(operation.responses)) {
      for (const [type, { schema, example, examples }] of Object.entries(response.content ?? {})) {
        const shown = example ?? Object.values(examples ?? {})[0]?.value;
        if (Number(status) >= 400 || (shown === undefined && !schema?.$ref)) continue;
        const parts = [element("summary", {}, `${status} as ${type}`)];
        if (shown !== undefined) {
          const text = typeof shown === "string" ? shown : JSON.stringify(shown, null, 2);
          parts.push(element("pre", { tabindex: "0" }, text));
        }
        if (schema?.$ref) parts.push(this.fields(schema));
        made.push(element("details", {}, ...parts));
      }
    }
    return made;
  }

  samples(operation) {
    const lines = (operation["x-codeSamples"] ?? []).map((sample) => sample.source);
    return lines.length ? [element("pre", { tabindex: "0" }, lines.join("\n"))] : [];
  }

  operation(method, path, operation) {
    const title = element("h2", {}, element("span.method", {}, method.toUpperCase()), path);
    return element("article.card", { id: anchor(method, path) },
      title,
      element("p", {}, element("strong", {}, ...prose(operation.summary))),
      ...paragraphs(operation.description),
      ...this.samples(operation),
      ...this.parameters(operation),
      ...this.body(operation),
      ...this.responses(operation));
  }

  schemas() {
    const names = ["ErrorBody", "Label", "SeenBody", "Timing", "ExitBody", "OperatingPoint"];
    const all = this.document.components?.schemas ?? {};
    return names.filter((name) => all[name]).map((name) =>
      element("article.card", { id: name }, element("h2", {}, name),
        ...paragraphs(all[name].description), this.fields(all[name])));
  }

  draw() {
    const operations = Object.entries(this.document.paths).flatMap(([path, item]) =>
      METHODS.filter((m) => item[m]).map((m) => [m, path, item[m]]));
    const links = operations.map(([method, path]) =>
      element("a", { href: `#${anchor(method, path)}` }, element("span.method", {}, method.toUpperCase()), path));
    byId("about").textContent = `HTTP reference, version ${this.document.info.version}`;
    byId("contents").replaceChildren(...links);
    byId("operations").replaceChildren(...operations.map((o) => this.operation(...o)), ...this.schemas());
    if (location.hash) byId(location.hash.slice(1))?.scrollIntoView();
  }
}

const response = await fetch("openapi.json");
new Reference(await response.json()).draw();
