// Failures, confusion, survival, throughput, and how it was made.
function bars(name, is_filter) {
  const size_of = (kind) => (after[name] || {})[kind] || 0;
  const kinds = Object.keys(KINDS)
    .filter((kind) => runs.some((run) => (run.report[name] || {})[kind]))
    .sort((a, b) => size_of(b) - size_of(a));
  const most = Math.max(1, ...runs.flatMap((run) => Object.values(run.report[name] || {})));
  return h(
    "ul",
    { class: "bars" },
    kinds.map((kind) => {
      const counts = runs.map((run) => (run.report[name] || {})[kind] || 0);
      const tracks = counts.map((number, place) => {
        const bar = h("span", { class: "fill" });
        bar.style.width = `${(100 * number) / most}%`;
        return h("span", { class: "track" + (compares && !place ? " first" : "") }, bar);
      });
      const inner = [
        h("span", { class: "what" }, label(kind), h("small", null, " · ", KINDS[kind][1])),
        h("span", { class: "num" }, counts.map(count).join(" → ")),
        tracks,
      ];
      return h(
        "li",
        null,
        is_filter
          ? h("button", { class: "bar", type: "button", onclick: () => choose({ failure: kind }) }, inner)
          : h("div", { class: "bar" }, inner),
      );
    }),
  );
}
function failures() {
  const wrong = runs.map((run) => Object.values(run.report.failures).reduce((sum, number) => sum + number, 0));
  const has_arguments = runs.some((run) => Object.values(run.report.arg_errors || {}).some(Boolean));
  return section(
    "failures",
    "Failures by kind",
    `${wrong.map(count).join(" → ")} wrong; each under the first kind that applies`,
    wrong.some(Boolean) ? bars("failures", true) : h("p", null, "None: every decision was right."),
    has_arguments && more("Wrong arguments of matched calls, all of them", bars("arg_errors", false)),
  );
}

const is_special = (name) => /^\((no call|not offered|malformed)\)$/.test(name);
function confusion() {
  let number = runs.length - 1,
    all = false;
  const place = h("div"),
    tabs = h("div", { class: "tabs" }),
    buttons = [];
  function draw() {
    // As maps: a tool may be called "constructor".
    const found = new Map(
      Object.entries(runs[number].report.confusion).map(([gold, row]) => [gold, new Map(Object.entries(row))]),
    );
    const of = (gold, called) => found.get(gold)?.get(called) || 0;
    const sums = new Map(
      [...found].map(([gold, row]) => [gold, [...row.values()].reduce((total, one) => total + one, 0)]),
    );
    const wrong = new Map(); // calls that were another tool's, or should have been
    for (const [gold, row] of found)
      for (const [called, calls] of row)
        for (const name of [gold, called]) wrong.set(name, (wrong.get(name) || 0) + (gold === called ? 0 : calls));
    const names = [...wrong.keys()];
    const normal = names
      .filter((name) => !is_special(name))
      .sort((a, b) => wrong.get(b) - wrong.get(a) || (a < b ? -1 : 1))
      .slice(0, MANY_TOOLS);
    const kept = new Set(all ? normal : normal.slice(0, MAX_TOOLS)),
      special = names.filter(is_special).sort();
    const rows = [...normal, ...special].filter((name) => found.has(name) && (kept.has(name) || is_special(name)));
    const columns = [...normal, ...special].filter(
      (name) => (kept.has(name) || is_special(name)) && rows.some((gold) => of(gold, name)),
    );
    const cell = (gold, called) => {
      const calls = of(gold, called);
      if (!calls) return h("td", { class: gold === called ? "hit" : null });
      const share = calls / sums.get(gold),
        level = share > 0.5 ? 3 : share > 0.15 ? 2 : 1,
        is_hit = gold === called;
      const said = `gold ${plain(gold)}, called ${plain(called)}: ${calls}`;
      return h(
        "td",
        { class: (is_hit ? "hit h" : "m") + level },
        h(
          "button",
          {
            type: "button",
            title: said,
            "aria-label": said,
            onclick: () => choose({ gold: plain(gold), called: plain(called), run: compares ? String(number) : "" }),
          },
          count(calls),
        ),
      );
    };
    const name_of = (name) =>
      h("span", { class: is_special(name) ? "special" : null, title: plain(name) }, show(name));
    place.replaceChildren(
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "confusion matrix" },
        h(
          "table",
          { class: "matrix" },
          h(
            "thead",
            null,
            h(
              "tr",
              null,
              h("th", { class: "corner" }, "gold ↓  called →"),
              columns.map((name) => h("th", { scope: "col" }, h("span", { class: "down-text" }, name_of(name)))),
            ),
          ),
          h(
            "tbody",
            null,
            rows.map((gold) =>
              h(
                "tr",
                null,
                h("th", { scope: "row" }, name_of(gold)),
                columns.map((called) => cell(gold, called)),
              ),
            ),
          ),
        ),
      ),
      h(
        "p",
        { class: "soft small after" },
        "Outlined cells are right. Shades are shares of the row. A number shows its samples.",
      ),
      normal.length > MAX_TOOLS
        ? h(
            "button",
            {
              class: "plain small after",
              type: "button",
              onclick: () => {
                all = !all;
                draw();
              },
            },
            `Show the ${all ? MAX_TOOLS : normal.length} tools that are confused most`,
          )
        : "",
    );
    buttons.forEach((button, other) => button.setAttribute("aria-pressed", String(other === number)));
  }
  if (compares)
    for (const [other, name] of ["before", "after"].entries()) {
      buttons.push(
        h(
          "button",
          {
            type: "button",
            onclick: () => {
              number = other;
              draw();
            },
          },
          name,
        ),
      );
    }
  tabs.append(...buttons);
  draw();
  return section(
    "confusion",
    "Which tool was called",
    compares ? tabs : "calls of gold, by what was called instead",
    place,
  );
}

function survival() {
  const curves = runs.map((run) => run.report.survival || []),
    last = Math.max(0, ...curves.map((curve) => curve.length));
  const all_fail = after.num_decision_points > after.num_trajectories;
  const reason = all_fail
    ? "No trajectory is right at its first decision point."
    : "Every trajectory has one decision point.";
  if (last < 2)
    return section(
      "survival",
      "Survival over decision points",
      "",
      h("p", { class: "soft" }, reason),
    );
  const width = 520,
    height = 234,
    x = (step) => 44 + ((width - 60) * step) / last,
    y = (share) => 14 + (height - 52) * (1 - share);
  const path = (curve) =>
    curve.reduce(
      (made, { step, survival: share }) => `${made}H${x(step - 0.5).toFixed(1)}V${y(share).toFixed(1)}`,
      `M${x(0)} ${y(1)}`,
    ) + `H${x(curve.length).toFixed(1)}`;
  const every = Math.ceil(last / 12),
    steps = [...Array(last).keys()].map((step) => step + 1).filter((step) => step === 1 || step % every === 0);
  const ends = curves.map((curve) => curve[curve.length - 1]);
  const chart = s(
    "svg",
    {
      class: "chart",
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label":
        "Trajectories right so far; at the end " + ends.map((end) => percent(end.survival)).join(", then "),
    },
    [0, 0.25, 0.5, 0.75, 1].map((share) => [
      s("line", { class: "grid", x1: x(0), x2: x(last), y1: y(share), y2: y(share) }),
      s("text", { x: x(0) - 7, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`),
    ]),
    steps.map((step) => s("text", { x: x(step - 0.5), y: height - 19, "text-anchor": "middle" }, String(step))),
    s("text", { x: x(last / 2), y: height - 4, "text-anchor": "middle" }, "decision point"),
    s("path", { class: "area", d: `${path(curves[curves.length - 1])}V${y(0)}H${x(0)}Z` }),
    curves.map((curve, place) => s("path", { class: "step" + (compares && !place ? " first" : ""), d: path(curve) })),
  );
  const rows = [...Array(last).keys()].map((step) => [
    step + 1,
    ...curves.flatMap((curve) =>
      curve[step]
        ? [count(curve[step].at_risk), count(curve[step].failed), percent(curve[step].survival)]
        : ["", "", ""],
    ),
  ]);
  const head = [
    ["decision point", "num"],
    ...runs.flatMap((_, place) =>
      ["trajectories", "first failure", "right so far"].map((name) => [
        compares ? `${name}, ${place ? "after" : "before"}` : name,
        "num",
      ]),
    ),
  ];
  return section(
    "survival",
    "Survival over decision points",
    "trajectories that are right so far",
    chart,
    compares && h("p", { class: "legend" }, "dashed: before · solid: after"),
    more("As a table", table(head, rows)),
  );
}

function throughput() {
  const parts = times.map((time, place) => {
    const ranks = time.ranks || [],
      sum = (name) => ranks.reduce((total, rank) => total + (rank[name] || 0), 0),
      seconds = Math.max(0, ...ranks.map((rank) => rank.seconds || 0));
    const per = (number) =>
      seconds
        ? (number / seconds).toLocaleString("en-US", { maximumFractionDigits: number / seconds < 10 ? 2 : 0 })
        : "–";
    const figure = (value, name) => h("div", null, h("b", null, value), h("span", { class: "soft small" }, name));
    const head = compares && h("h3", null, place ? "after" : "before");
    if (!ranks.length || !sum("answers"))
      return [
        head,
        h(
          "p",
          { class: "soft" },
          ranks.length ? "All answers were there already: the last start only made the report." : "Not noted.",
        ),
      ];
    return [
      head,
      h(
        "div",
        { class: "figures" },
        figure(per(sum("answers")), "answers a second"),
        ranks[0].tokens_written !== undefined && figure(per(sum("tokens_written")), "tokens written a second"),
        ranks[0].tokens_read !== undefined && figure(per(sum("tokens_read")), "prompt tokens read a second"),
        figure(count(Math.round(seconds)), "seconds"),
        figure(time.world_size || ranks.length, ranks.length === 1 ? "rank" : "ranks"),
      ),
      sum("answers") < after.num_decision_points * after.num_samples &&
        h(
          "p",
          { class: "soft small" },
          `Of the last start, which gave ${count(sum("answers"))} answers; the others were there.`,
        ),
      ranks.length > 1 &&
        more(
          "By rank",
          table(
            [["rank", "num"], ...Object.keys(ranks[0]).map((name) => [name.replaceAll("_", " "), "num"])],
            ranks.map((rank, number) => [
              number,
              ...Object.values(rank).map((value) => (typeof value === "number" ? count(value) : String(value))),
            ]),
          ),
        ),
    ];
  });
  return section("throughput", "Throughput", "without loading the model", parts);
}

function about() {
  const names = [
    "model",
    "model_hash",
    "adapter",
    "adapter_hash",
    "data",
    "data_hash",
    "limit",
    "template_hash",
    "encoding",
  ];
  const parts = runs.map(({ report }, place) => {
    const told = names
      .filter((name) => report[name] !== null && report[name] !== undefined)
      .map((name) => [name, report[name]]);
    if (times[place].command) told.push(["command", times[place].command]);
    const list = (entries) =>
      h(
        "dl",
        { class: "pairs" },
        entries.map(([name, value]) => [
          h("dt", null, name.replaceAll("_", " ")),
          h("dd", { class: "mono" }, show(typeof value === "string" ? value : JSON.stringify(value))),
        ]),
      );
    const versions = Object.entries(report.versions || {});
    return [
      compares && h("h3", null, place ? "after" : "before"),
      h("div", { class: "wide" }, list(told), versions.length > 0 && list(versions)),
      more("Settings", list(Object.entries(report.settings || {}))),
    ];
  });
  return section(
    "about",
    "How it was made",
    "",
    compares
      ? h(
          "div",
          { class: "sides" },
          parts.map((part) => h("div", null, part)),
        )
      : parts,
  );
}
