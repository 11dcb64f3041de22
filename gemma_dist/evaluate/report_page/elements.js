// The page of an evaluation, or of two that are compared. All texts come from models and rows: they are put in as texts
// (`show`), never as markup, and signs that would hide or turn around what one reads become visible.
const block = (id) => JSON.parse(document.getElementById(id).textContent);
const { runs, comparison, headline, sentences, parts, has_prompts, left_out, max_mb } = block("overview");
const times = block("times"),
  samples = block("samples");
const before = runs[0].report,
  after = runs[runs.length - 1].report,
  compares = runs.length > 1;
const AT_ONCE = 100,
  MAX_TEXT = 20000,
  MAX_TOOLS = 24,
  MANY_TOOLS = 120; // a browser draws the square of it

const KINDS = {
  malformed: ["Unreadable call", "a call was begun that cannot be read"],
  truncated: ["Cut off", "the output ends inside a call, or at its token limit"],
  silent: ["Said nothing", "neither a call nor a word"],
  no_call: ["No call", "text where gold calls a tool"],
  unwanted_call: ["Unwanted call", "a call where gold answers in words"],
  not_offered: ["Tool not offered", "a call of a tool that was not declared"],
  wrong_tool: ["Wrong tool", "another tool than gold's"],
  missing_call: ["Missing call", "fewer calls than gold"],
  extra_call: ["Extra call", "more calls than gold"],
  missing_required: ["Argument missing", "the schema requires it"],
  unknown_name: ["Unknown argument", "the schema does not know it"],
  wrong_type: ["Wrong type", "of none that would be right"],
  wrong_value: ["Wrong value", "of the right type"],
  wrong_optional_use: ["Optional argument", "left out though wanted, or given though not"],
};
const LABELS = {
  overall: "Right decisions",
  sample_exact: "All calls exact",
  abstain_acc: "Answers in words",
  trajectory_exact: "Whole trajectories",
  answer_contains: "Answer said",
  image_pair_acc: "Image pairs right",
  parse_ok: "Readable outputs",
};
const STATUS = { ok: "calls read", no_call: "text", malformed: "unreadable", truncated: "cut off" };
const label = (kind) => (KINDS[kind] ? KINDS[kind][0] : kind || "Right");

const SVG = "http://www.w3.org/2000/svg";
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity))
    if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Controls (but for line feed and tab), bidirectional marks, signs without a width, and halves of a surrogate pair.
const ODD = new RegExp(
  [
    "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u115f\\u1160\\u180e\\u200b\\u200e\\u200f]",
    "[\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\ufff9-\\ufffb]|[\\u{e0000}-\\u{e007f}]",
    "[\\ud800-\\udfff]", // of whole pairs, this finds none
  ].join("|"),
  "gu",
);
function odd(sign) {
  const code = sign.codePointAt(0);
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  return code === 0x7f ? "\u2421" : "U+" + code.toString(16).toUpperCase().padStart(4, "0");
}
const plain = (text) => String(text).replace(ODD, odd); // for attributes and options, which hold no elements
function show(text) {
  // the text as nodes
  const found = [];
  let last = 0;
  text = String(text);
  for (const match of text.matchAll(ODD)) {
    found.push(
      text.slice(last, match.index),
      h(
        "span",
        { class: "odd", title: "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0") },
        odd(match[0]),
      ),
    );
    last = match.index + match[0].length;
  }
  found.push(text.slice(last));
  return found;
}
function long(text) {
  // the same, a very long one on request
  if (text.length <= MAX_TEXT) return show(text);
  const rest = h(
    "button",
    { class: "plain", onclick: () => rest.replaceWith(...show(text.slice(MAX_TEXT))) },
    `show ${count(text.length - MAX_TEXT)} more characters`,
  );
  return [...show(text.slice(0, MAX_TEXT)), rest];
}

const count = (number) => Number(number).toLocaleString("en-US");
const percent = (share) => (share === null || share === undefined ? "–" : (100 * share).toFixed(1) + " %");
const pp = (share) =>
  share === null || share === undefined ? "–" : (share < 0 ? "\u2212" : "+") + Math.abs(100 * share).toFixed(1);
const range = (low, high) =>
  low === null || low === undefined ? "" : `${(100 * low).toFixed(1)} – ${(100 * high).toFixed(1)}`;
const p_value = (p) => (p === null || p === undefined ? "" : p < 0.0001 ? "< 0.0001" : p.toPrecision(2));
const section = (id, title, note, ...children) =>
  h(
    "section",
    { class: "card", id, tabindex: -1 },
    h("header", null, h("h2", null, title), note && h("span", { class: "soft small" }, note)),
    ...children,
  );
const table = (head, rows) =>
  h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "table" },
    h(
      "table",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          head.map(([name, kind]) => h("th", { class: kind || null, scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        null,
        rows.map((row) =>
          h(
            "tr",
            null,
            row.map((cell, place) =>
              h(place ? "td" : "th", { class: head[place][1] || null, scope: place ? null : "row" }, cell),
            ),
          ),
        ),
      ),
    ),
  );
const more = (title, ...children) => h("details", { class: "more" }, h("summary", null, title), ...children);
