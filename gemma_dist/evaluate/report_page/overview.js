// Headline, metrics and slices.
function top() {
  const images = [...new Set(runs.map((run) => (run.report.settings || {}).images || "as_is"))];
  const facts = [
    `${count(after.num_decision_points)} decision points`,
    `${count(after.num_trajectories)} trajectories`,
    after.num_samples > 1 && `${after.num_samples} answers to each`,
    images.join() !== "as_is" && `images: ${images.join(", then ")}`,
  ];
  return h(
    "header",
    { class: "top" },
    h("p", { class: "eyebrow" }, compares ? "Evaluation, before and after" : "Evaluation"),
    compares ? h("h1", null, "Is it better?") : h("h1", null, show(runs[0].name)),
    compares &&
      h(
        "div",
        { class: "versus" },
        runs.map((run, place) => h("div", null, h("b", null, place ? "after" : "before"), " ", show(run.name))),
      ),
    h(
      "div",
      { class: "facts" },
      h("span", null, "on ", show(after.data)),
      facts.filter(Boolean).map((fact) => h("span", null, fact)),
    ),
  );
}

function notices() {
  const lost = Object.entries(left_out)
    .filter(([, number]) => number)
    .map(([kind, number]) => `${count(number)} ${kind}`);
  const found = [];
  if (lost.length)
    found.push(
      `Left out, so that this page stays below about ${max_mb} MB: ${lost.join(", ")}. ` +
        (left_out.samples ? "Samples that are wrong come first. " : "") +
        "samples.jsonl, tools.json, trajectories.jsonl and images/ have all; the numbers above the list are of all.",
    );
  if (!has_prompts) found.push("This run kept no trajectories.jsonl, so prompts and images are not shown here.");
  return found.map((text) => h("p", { class: "notice", role: "note" }, text));
}

const on = (share) => 4 + 192 * share; // where a share lies in a range of 200
function whisker(metric, y, is_first) {
  const low = metric.cluster_low,
    high = metric.cluster_high;
  return s(
    "g",
    { class: is_first ? "first" : null },
    low !== null && s("line", { class: "whisker", x1: on(low), x2: on(high), y1: y, y2: y }),
    s("circle", { class: "dot", cx: on(metric.value), cy: y, r: 4 }),
  );
}
function cards() {
  const found = headline
    .filter((name) => after.metrics[name] && after.metrics[name].denominator)
    .map((name) => {
      const metric = after.metrics[name],
        old = before.metrics[name],
        change = compares && comparison.metrics[name];
      const picture = s(
        "svg",
        { class: "range", viewBox: "0 0 200 16", "aria-hidden": "true" },
        s("line", { class: "axis", x1: 4, x2: 196, y1: 8, y2: 8 }),
        compares && old && old.denominator && whisker(old, 3.5, true),
        whisker(metric, compares ? 12.5 : 8),
      );
      return h(
        "article",
        { class: "metric", title: sentences[name] },
        h("span", { class: "label" }, LABELS[name] || name),
        h("span", { class: "name" }, name),
        h(
          "div",
          { class: "value" },
          compares && h("small", null, old && old.denominator ? (100 * old.value).toFixed(1) : "–", " → "),
          percent(metric.value),
        ),
        change &&
          h(
            "div",
            { class: "change " + (change.low > 0 ? "up" : change.high < 0 ? "down" : "soft") },
            `${change.difference > 0 ? "▲ " : change.difference < 0 ? "▼ " : ""}${pp(change.difference)} points`,
            change.low !== null && h("span", { class: "small" }, ` (${pp(change.low)} to ${pp(change.high)})`),
          ),
        picture,
        h(
          "span",
          { class: "of" },
          `${count(metric.numerator)} of ${count(metric.denominator)}`,
          !compares && metric.cluster_low !== null && h("br"),
          !compares && metric.cluster_low !== null && `95 %: ${range(metric.cluster_low, metric.cluster_high)}`,
          change &&
            change.fixed !== null &&
            h("span", null, h("br"), `${count(change.fixed)} fixed, ${count(change.broken)} broken`),
        ),
      );
    });
  return h("div", { class: "metrics", id: "overview" }, found);
}

function verdict() {
  if (!compares) return null;
  const { fixed, broken, p_value: p, low, high } = comparison.overall;
  const said =
    low > 0
      ? "Better, by more than chance."
      : high < 0
        ? "Worse, by more than chance."
        : "No difference that chance could not make.";
  return section(
    "verdict",
    said,
    "of overall, 95 % interval by trajectory",
    h(
      "dl",
      { class: "pairs" },
      h("dt", null, "Difference"),
      h("dd", null, `${pp(comparison.overall.difference)} points of 100, 95 %: ${pp(low)} to ${pp(high)}`),
      h("dt", null, "Changed points"),
      h(
        "dd",
        null,
        `${count(fixed)} fixed, ${count(broken)} broken; ` +
          `McNemar's exact test: p ${p < 0.0001 ? "" : "= "}${p_value(p)}`,
      ),
      h("dt", null, "What would show"),
      h(
        "dd",
        null,
        `a true difference of ${(100 * comparison.smallest_difference).toFixed(1)} points, in 8 of 10 cases`,
      ),
      comparison.image_gain && [
        h("dt", null, "Gain by images"),
        h(
          "dd",
          null,
          `${pp(comparison.image_gain.value)} points, 95 %: ` +
            `${pp(comparison.image_gain.low)} to ${pp(comparison.image_gain.high)}, as they are ` +
            `less ${comparison.image_gain.without}, at ${count(comparison.image_gain.num_points)} points`,
        ),
      ],
    ),
  );
}

function all_metrics() {
  if (compares) {
    const rows = Object.entries(comparison.metrics).map(([name, m]) => [
      name,
      percent(m.before),
      percent(m.after),
      pp(m.difference),
      m.low === null ? "" : `${pp(m.low)} to ${pp(m.high)}`,
      m.fixed === null ? "" : m.fixed,
      m.broken === null ? "" : m.broken,
      p_value(m.p_value),
    ]);
    return more(
      "All metrics",
      table(
        [
          ["metric", "mono"],
          ["before", "num"],
          ["after", "num"],
          ["difference", "num"],
          ["95 % by trajectory", "num"],
          ["fixed", "num"],
          ["broken", "num"],
          ["p", "num"],
        ],
        rows,
      ),
    );
  }
  const rows = Object.entries(after.metrics)
    .filter(([, m]) => m.denominator)
    .map(([name, m]) => [
      name,
      percent(m.value),
      range(m.cluster_low, m.cluster_high),
      range(m.low, m.high),
      `${count(m.numerator)} of ${count(m.denominator)}`,
      after.bfcl && after.bfcl[name] ? percent(after.bfcl[name].value) : "",
      sentences[name] || "",
    ]);
  return more(
    "All metrics, with both intervals and by BFCL's rule",
    table(
      [
        ["metric", "mono"],
        ["value", "num"],
        ["95 % by trajectory", "num"],
        ["95 % Wilson", "num"],
        ["of", "num"],
        ["by BFCL's rule", "num"],
        ["numerator / denominator", "wrap"],
      ],
      rows,
    ),
  );
}

function slices() {
  const source = compares ? comparison.slices : after.slices;
  const found = Object.entries(source || {}).map(([name, values]) => {
    const rows = Object.entries(values).map(([value, m]) =>
      compares
        ? [
            show(value),
            percent(m.before),
            percent(m.after),
            pp(m.difference),
            m.low === null ? "" : `${pp(m.low)} to ${pp(m.high)}`,
            p_value(m.p_holm),
          ]
        : [
            show(value),
            percent(m.overall.value),
            range(m.overall.cluster_low, m.overall.cluster_high),
            count(m.overall.denominator),
          ],
    );
    const head = compares
      ? [
          [name, ""],
          ["before", "num"],
          ["after", "num"],
          ["difference", "num"],
          ["95 % by trajectory", "num"],
          ["p (Holm)", "num"],
        ]
      : [
          [name, ""],
          ["overall", "num"],
          ["95 % by trajectory", "num"],
          ["points", "num"],
        ];
    return [h("h3", null, `by ${name.replaceAll("_", " ")}`), table(head, rows)];
  });
  return found.length ? more("overall by slice: turn, tool, length and more", found) : null;
}

// Probes and a general set, which count in no other number.
function beside() {
  const source = compares ? comparison.beside : after.beside;
  if (!source) return null;
  const shown = ["over_calling", "abstain_acc", "tool_set_exact", "overall"];
  const rows = Object.entries(source.parts).flatMap(([part, metrics]) =>
    shown
      .filter((name) => metrics[name])
      .map((name) => {
        const m = metrics[name];
        return compares
          ? [parts[part], name, percent(m.before), percent(m.after), pp(m.difference), range_of(m)]
          : [parts[part], name, percent(m.value), range(m.cluster_low, m.cluster_high), of(m)];
      }),
  );
  const head = compares
    ? [["before", "num"], ["after", "num"], ["difference", "num"], ["95 % by trajectory", "num"]]
    : [["value", "num"], ["95 % by trajectory", "num"], ["of", "num"]];
  return more("Beside the held-out rows: probes and a general set", table([["part", ""], ["metric", "mono"], ...head], rows));
}
const of = (m) => `${count(m.numerator)} of ${count(m.denominator)}`;
const range_of = (m) => (m.low === null ? "" : `${pp(m.low)} to ${pp(m.high)}`);
