// The list of samples and its filters, which stand in the address.
const last_of = (sample) => sample.answers[sample.answers.length - 1];
function change_of(sample) {
  const [one, two] = [sample.answers[0].right, last_of(sample).right];
  return one === two ? (one ? "right in both" : "wrong in both") : two ? "fixed" : "broken";
}
function words_of(sample) {
  if (sample.words === undefined) {
    const texts = [sample.id, sample.category, sample.gold.text, ...sample.gold.tools, ...sample.gold.answers];
    for (const answer of sample.answers) {
      texts.push(...answer.pieces.map((piece) => piece[1]));
      for (const call of answer.calls) for (const one of call.arguments) texts.push(one.path, one.gold || "");
    }
    sample.words = texts.join("\n").toLowerCase();
  }
  return sample.words;
}
const counted = (values) => {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  return counts;
};
const by_count = (values) => [...counted(values)].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
const tools_of = (sample) => [
  ...new Set([...sample.gold.tools, ...sample.answers.flatMap((answer) => answer.called)].map(plain)),
];

const state = {}; // of the filters, as the address has it after #
const FILTERS = {
  change: {
    name: "changed or not",
    options: () => by_count(samples.map(change_of)),
    passes: (sample, value) => change_of(sample) === value,
    shown: compares,
  },
  right: {
    name: "right or wrong",
    options: () => by_count(samples.map((one) => (last_of(one).right ? "right" : "wrong"))),
    passes: (one, value) => (last_of(one).right ? "right" : "wrong") === value,
    shown: !compares,
  },
  failure: {
    name: "any failure",
    options: () =>
      by_count(samples.flatMap((one) => [...new Set(one.answers.map((answer) => answer.failure).filter(Boolean))])),
    text: label,
    passes: (one, value) => one.answers.some((answer) => answer.failure === value),
  },
  tool: {
    name: "any tool",
    options: () => by_count(samples.flatMap(tools_of)),
    passes: (one, value) => tools_of(one).includes(value),
  },
  category: {
    name: "any category",
    options: () => by_count(samples.map((one) => plain(one.category)).filter(Boolean)),
    passes: (one, value) => plain(one.category) === value,
  },
  status: {
    name: "any status",
    options: () => by_count(samples.flatMap((one) => [...new Set(one.answers.map((answer) => answer.status))])),
    text: (value) => STATUS[value] || value,
    passes: (one, value) => one.answers.some((answer) => answer.status === value),
  },
  images: {
    name: "with or without images",
    options: () => by_count(samples.map((one) => (one.num_images ? "with images" : "without images"))),
    passes: (one, value) => (one.num_images ? "with images" : "without images") === value,
  },
};
const search = h("input", {
  type: "search",
  placeholder: "Search ids, outputs, arguments",
  "aria-label": "Search ids, outputs and arguments",
});
const selects = {},
  list = h("ol", { class: compares ? "list compares" : "list" }),
  told = h("div", { class: "count", role: "status" }),
  pager = h("div", { class: "pager" });
let found = [],
  num_shown = 0;

function passes(sample) {
  for (const [name, filter] of Object.entries(FILTERS))
    if (state[name] && !filter.passes(sample, state[name])) return false;
  if (state.gold !== undefined && state.called !== undefined) {
    const judged = state.run === undefined || state.run === "" ? sample.answers : [sample.answers[Number(state.run)]];
    if (
      !judged.some(
        (answer) =>
          answer &&
          answer.confusion.some(([gold, called]) => plain(gold) === state.gold && plain(called) === state.called),
      )
    )
      return false;
  }
  return !state.q || words_of(sample).includes(state.q.toLowerCase());
}
const key_of = (sample) => `${sample.trajectory}.${sample.turn}.${sample.sample}`;

function write_address() {
  const parts = Object.entries(state)
    .filter(([, value]) => value)
    .map(([name, value]) => `${name}=${encodeURIComponent(value.toWellFormed ? value.toWellFormed() : value)}`);
  try {
    history.replaceState(null, "", parts.length ? "#" + parts.join("&") : "#");
  } catch {
    /* an address that may not change */
  }
}
function read_address() {
  for (const name of Object.keys(state)) delete state[name];
  for (const part of location.hash.slice(1).split("&")) {
    const [name, value] = part.split(/=(.*)/s);
    if (value && (Object.hasOwn(FILTERS, name) || ["q", "open", "gold", "called", "run"].includes(name))) {
      try {
        state[name] = decodeURIComponent(value);
      } catch {
        /* no such text */
      }
    }
  }
}
function choose(change) {
  // from a bar or a cell: that alone
  for (const name of Object.keys(state)) delete state[name];
  for (const [name, value] of Object.entries(change)) if (value) state[name] = value;
  update();
  document.getElementById("samples").scrollIntoView();
}
function set(name, value) {
  if (value) state[name] = value;
  else delete state[name];
  delete state.open;
  update();
}

function update() {
  search.value = state.q || "";
  for (const [name, select] of Object.entries(selects)) {
    select.value = state[name] || "";
    select.classList.toggle("set", Boolean(state[name]));
  }
  found = samples.filter(passes);
  num_shown = 0;
  list.replaceChildren();
  const active = Object.keys(state).some((name) => name !== "open");
  told.replaceChildren(
    h(
      "span",
      null,
      `${count(found.length)} of ${count(samples.length)} ${samples.length === 1 ? "sample" : "samples"}`,
    ),
    state.gold !== undefined && state.called !== undefined
      ? h("span", { class: "chip" }, "gold ", show(state.gold), ", called ", show(state.called))
      : "",
    active ? h("button", { class: "plain small", type: "button", onclick: () => choose({}) }, "Clear filters") : "",
    found.length
      ? h(
          "button",
          {
            class: "plain small",
            type: "button",
            onclick: () => {
              if (state.open === "all") delete state.open;
              else state.open = "all";
              update();
            },
          },
          state.open === "all" ? "Close all" : "Open all",
        )
      : "",
    h(
      "span",
      { class: "keys soft small" },
      h("kbd", null, "j"),
      " ",
      h("kbd", null, "k"),
      " next, previous · ",
      h("kbd", null, "Enter"),
      " open · ",
      h("kbd", null, "/"),
      " search",
    ),
  );
  list.classList.toggle("hidden", !found.length);
  const place = found.findIndex((sample) => key_of(sample) === state.open);
  do grow();
  while (num_shown <= place);
  write_address();
}
function grow() {
  for (const sample of found.slice(num_shown, num_shown + AT_ONCE)) list.append(item(sample));
  num_shown = Math.min(found.length, num_shown + AT_ONCE);
  const rest = found.length - num_shown;
  pager.replaceChildren(
    rest
      ? h(
          "button",
          { class: "plain", type: "button", onclick: grow },
          `Show ${count(Math.min(AT_ONCE, rest))} more of ${count(rest)}`,
        )
      : found.length
        ? ""
        : "Nothing here passes these filters.",
  );
}

function badge(answer) {
  return answer.right
    ? h("span", { class: "badge right" }, "✓ Right")
    : h("span", { class: "badge wrong" }, "✗ " + label(answer.failure));
}
function gold_said(sample) {
  if (sample.gold.any_call) return "any call";
  return sample.gold.tools.length ? sample.gold.tools.join(", ") : "text";
}
const called_said = (answer) => (answer.called.length ? answer.called.join(", ") : STATUS[answer.status]);
function item(sample) {
  const entry = h("li");
  const turn =
    sample.answers.length && after.num_samples > 1
      ? ` · turn ${sample.turn} · answer ${sample.sample + 1}`
      : ` · turn ${sample.turn}`;
  const row = h(
    "button",
    { class: "row", type: "button", "aria-expanded": "false", onclick: () => toggle(entry, row, sample) },
    h(
      "span",
      { class: "verdicts" },
      compares ? [badge(sample.answers[0]), " → ", badge(sample.answers[1])] : badge(sample.answers[0]),
    ),
    h("span", { class: "id" }, h("bdi", null, show(sample.id)), h("span", { class: "soft" }, turn)),
    h(
      "span",
      { class: "calls" },
      h("bdi", null, show(gold_said(sample))),
      " → ",
      h("bdi", null, show(sample.answers.map(called_said).join(" → "))),
    ),
  );
  entry.append(row);
  if (state.open === key_of(sample) || state.open === "all") open(entry, row, sample);
  return entry;
}
function toggle(entry, row, sample) {
  if (row.getAttribute("aria-expanded") === "false") {
    open(entry, row, sample);
    state.open = key_of(sample);
  } else {
    row.setAttribute("aria-expanded", "false");
    entry.querySelector(".detail").remove();
    delete state.open;
  }
  write_address();
}
function open(entry, row, sample) {
  row.setAttribute("aria-expanded", "true");
  entry.append(detail(sample));
}
