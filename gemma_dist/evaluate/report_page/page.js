"use strict";
// The page of an evaluation, or of two that are compared. All texts come from models and rows: they are put in as texts
// (`show`), never as markup, and signs that would hide or turn around what one reads become visible.
(() => {
  const block = (id) => JSON.parse(document.getElementById(id).textContent);
  const { runs, comparison, headline, sentences, tools, has_prompts, left_out, max_mb } = block("overview");
  const times = block("times"), samples = block("samples");
  const before = runs[0].report, after = runs[runs.length - 1].report, compares = runs.length > 1;
  const AT_ONCE = 100, MAX_TEXT = 20000, MAX_TOOLS = 24;

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
    overall: "Right decisions", sample_exact: "All calls exact", abstain_acc: "Answers in words", trajectory_exact: "Whole trajectories",
    answer_contains: "Answer said", image_pair_acc: "Image pairs right", parse_ok: "Readable outputs",
  };
  const STATUS = { ok: "calls read", no_call: "text", malformed: "unreadable", truncated: "cut off" };
  const label = (kind) => (KINDS[kind] ? KINDS[kind][0] : kind || "Right");

  // ---- elements ----------------------------------------------------------------------------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) node.append(child);
    return node;
  }
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  // Controls (but for line feed and tab), bidirectional marks, signs without a width, and halves of a surrogate pair.
  const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/gu;
  function odd(sign) {
    const code = sign.codePointAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? "\u2421" : "U+" + code.toString(16).toUpperCase().padStart(4, "0");
  }
  const plain = (text) => String(text).replace(ODD, odd);  // for attributes and options, which hold no elements
  function show(text) {  // the text as nodes
    const found = [];
    let last = 0;
    text = String(text);
    for (const match of text.matchAll(ODD)) {
      found.push(text.slice(last, match.index), h("span", { class: "odd", title: "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0") }, odd(match[0])));
      last = match.index + match[0].length;
    }
    found.push(text.slice(last));
    return found;
  }
  function long(text) {  // the same, a very long one on request
    if (text.length <= MAX_TEXT) return show(text);
    const rest = h("button", { class: "plain", onclick: () => rest.replaceWith(...show(text.slice(MAX_TEXT))) }, `show ${count(text.length - MAX_TEXT)} more characters`);
    return [...show(text.slice(0, MAX_TEXT)), rest];
  }

  const count = (number) => Number(number).toLocaleString("en-US");
  const percent = (share) => (share === null || share === undefined ? "–" : (100 * share).toFixed(1) + " %");
  const pp = (share) => (share === null || share === undefined ? "–" : (share < 0 ? "\u2212" : "+") + Math.abs(100 * share).toFixed(1));
  const range = (low, high) => (low === null || low === undefined ? "" : `${(100 * low).toFixed(1)} – ${(100 * high).toFixed(1)}`);
  const p_value = (p) => (p === null || p === undefined ? "" : p < 0.0001 ? "< 0.0001" : p.toPrecision(2));
  const section = (id, title, note, ...children) =>
    h("section", { class: "card", id, tabindex: -1 }, h("header", null, h("h2", null, title), note && h("span", { class: "soft small" }, note)), ...children);
  const table = (head, rows) =>
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "table" }, h("table", null,
      h("thead", null, h("tr", null, head.map(([name, kind]) => h("th", { class: kind || null, scope: "col" }, name)))),
      h("tbody", null, rows.map((row) => h("tr", null, row.map((cell, place) => h(place ? "td" : "th", { class: head[place][1] || null, scope: place ? null : "row" }, cell)))))));
  const more = (title, ...children) => h("details", { class: "more" }, h("summary", null, title), ...children);

  // ---- overview ----------------------------------------------------------------------------------------------------
  function top() {
    const images = [...new Set(runs.map((run) => (run.report.settings || {}).images || "as_is"))];
    const facts = [`${count(after.num_decision_points)} decision points`, `${count(after.num_trajectories)} trajectories`,
      after.num_samples > 1 && `${after.num_samples} answers to each`, images.join() !== "as_is" && `images: ${images.join(", then ")}`];
    return h("header", { class: "top" },
      h("p", { class: "eyebrow" }, compares ? "Evaluation, before and after" : "Evaluation"),
      compares ? h("h1", null, "Is it better?") : h("h1", null, show(runs[0].name)),
      compares && h("div", { class: "versus" }, runs.map((run, place) => h("div", null, h("b", null, place ? "after" : "before"), " ", show(run.name)))),
      h("div", { class: "facts" }, h("span", null, "on ", show(after.data)), facts.filter(Boolean).map((fact) => h("span", null, fact))));
  }

  function notices() {
    const lost = Object.entries(left_out).filter(([, number]) => number).map(([kind, number]) => `${count(number)} ${kind}`);
    const found = [];
    if (lost.length) found.push(`Left out, so that this page stays below about ${max_mb} MB: ${lost.join(", ")}. ${left_out.samples ? "Samples that are wrong come first. " : ""}samples.jsonl, trajectories.jsonl and images/ have all; the numbers above the list are of all.`);
    if (!has_prompts) found.push("This run kept no trajectories.jsonl, so prompts and images are not shown here.");
    return found.map((text) => h("p", { class: "notice", role: "note" }, text));
  }

  const on = (share) => 4 + 192 * share;  // where a share lies in a range of 200
  function whisker(metric, y, is_first) {
    const low = metric.cluster_low, high = metric.cluster_high;
    return s("g", { class: is_first ? "first" : null },
      low !== null && s("line", { class: "whisker", x1: on(low), x2: on(high), y1: y, y2: y }),
      s("circle", { class: "dot", cx: on(metric.value), cy: y, r: 4 }));
  }
  function cards() {
    const found = headline.filter((name) => after.metrics[name] && after.metrics[name].denominator).map((name) => {
      const metric = after.metrics[name], old = before.metrics[name], change = compares && comparison.metrics[name];
      const picture = s("svg", { class: "range", viewBox: "0 0 200 16", "aria-hidden": "true" },
        s("line", { class: "axis", x1: 4, x2: 196, y1: 8, y2: 8 }), compares && old && old.denominator && whisker(old, 3.5, true), whisker(metric, compares ? 12.5 : 8));
      return h("article", { class: "metric", title: sentences[name] },
        h("span", { class: "label" }, LABELS[name] || name), h("span", { class: "name" }, name),
        h("div", { class: "value" }, compares && h("small", null, old && old.denominator ? (100 * old.value).toFixed(1) : "–", " → "), percent(metric.value)),
        change && h("div", { class: "change " + (change.low > 0 ? "up" : change.high < 0 ? "down" : "soft") },
          `${change.difference > 0 ? "▲ " : change.difference < 0 ? "▼ " : ""}${pp(change.difference)} points`, change.low !== null && h("span", { class: "small" }, ` (${pp(change.low)} to ${pp(change.high)})`)),
        picture,
        h("span", { class: "of" }, `${count(metric.numerator)} of ${count(metric.denominator)}`, !compares && metric.cluster_low !== null && h("br"), !compares && metric.cluster_low !== null && `95 %: ${range(metric.cluster_low, metric.cluster_high)}`,
          change && change.fixed !== null && h("span", null, h("br"), `${change.fixed} fixed, ${change.broken} broken`)));
    });
    return h("div", { class: "metrics", id: "overview" }, found);
  }

  function verdict() {
    if (!compares) return null;
    const { fixed, broken, p_value: p, low, high } = comparison.overall;
    const said = low > 0 ? "Better, by more than chance." : high < 0 ? "Worse, by more than chance." : "No difference that chance could not make.";
    return section("verdict", said, "of overall, 95 % interval by trajectory",
      h("dl", { class: "pairs" },
        h("dt", null, "Difference"), h("dd", null, `${pp(comparison.overall.difference)} points of 100, 95 %: ${pp(low)} to ${pp(high)}`),
        h("dt", null, "Changed points"), h("dd", null, `${fixed} fixed, ${broken} broken; McNemar's exact test: p ${p < 0.0001 ? "" : "= "}${p_value(p)}`),
        h("dt", null, "What would show"), h("dd", null, `a true difference of ${(100 * comparison.smallest_difference).toFixed(1)} points, in 8 of 10 cases`),
        comparison.image_gain && [h("dt", null, "Gain by images"), h("dd", null, `${pp(comparison.image_gain.value)} (${pp(comparison.image_gain.low)} to ${pp(comparison.image_gain.high)}), as they are less ${comparison.image_gain.without}, at ${count(comparison.image_gain.num_points)} points`)]));
  }

  function all_metrics() {
    if (compares) {
      const rows = Object.entries(comparison.metrics).map(([name, m]) => [name, percent(m.before), percent(m.after), pp(m.difference), m.low === null ? "" : `${pp(m.low)} to ${pp(m.high)}`, m.fixed === null ? "" : m.fixed, m.broken === null ? "" : m.broken, p_value(m.p_value)]);
      return more("All metrics", table([["metric", "mono"], ["before", "num"], ["after", "num"], ["difference", "num"], ["95 % by trajectory", "num"], ["fixed", "num"], ["broken", "num"], ["p", "num"]], rows));
    }
    const rows = Object.entries(after.metrics).filter(([, m]) => m.denominator).map(([name, m]) => [name, percent(m.value), range(m.cluster_low, m.cluster_high), range(m.low, m.high), `${count(m.numerator)} of ${count(m.denominator)}`, after.bfcl && after.bfcl[name] ? percent(after.bfcl[name].value) : "", sentences[name] || ""]);
    return more("All metrics, with both intervals and by BFCL's rule", table([["metric", "mono"], ["value", "num"], ["95 % by trajectory", "num"], ["95 % Wilson", "num"], ["of", "num"], ["by BFCL's rule", "num"], ["numerator / denominator", "wrap"]], rows));
  }

  function slices() {
    const source = compares ? comparison.slices : after.slices;
    const found = Object.entries(source || {}).map(([name, values]) => {
      const rows = Object.entries(values).map(([value, m]) => (compares
        ? [show(value), percent(m.before), percent(m.after), pp(m.difference), m.low === null ? "" : `${pp(m.low)} to ${pp(m.high)}`, p_value(m.p_holm)]
        : [show(value), percent(m.overall.value), range(m.overall.cluster_low, m.overall.cluster_high), count(m.overall.denominator)]));
      const head = compares ? [[name, ""], ["before", "num"], ["after", "num"], ["difference", "num"], ["95 % by trajectory", "num"], ["p (Holm)", "num"]] : [[name, ""], ["overall", "num"], ["95 % by trajectory", "num"], ["points", "num"]];
      return [h("h3", null, `by ${name.replaceAll("_", " ")}`), table(head, rows)];
    });
    return found.length ? more("overall by slice: turn, tool, length and more", found) : null;
  }

  // ---- failures, confusion, survival, throughput ---------------------------------------------------------------------
  function bars(name, is_filter) {
    const size_of = (kind) => (after[name] || {})[kind] || 0;
    const kinds = Object.keys(KINDS).filter((kind) => runs.some((run) => (run.report[name] || {})[kind])).sort((a, b) => size_of(b) - size_of(a));
    const most = Math.max(1, ...runs.flatMap((run) => Object.values(run.report[name] || {})));
    return h("ul", { class: "bars" }, kinds.map((kind) => {
      const counts = runs.map((run) => (run.report[name] || {})[kind] || 0);
      const tracks = counts.map((number, place) => {
        const bar = h("span", { class: "fill" });
        bar.style.width = `${(100 * number) / most}%`;
        return h("span", { class: "track" + (compares && !place ? " first" : "") }, bar);
      });
      const inner = [h("span", { class: "what" }, label(kind), h("small", null, " · ", KINDS[kind][1])), h("span", { class: "num" }, counts.map(count).join(" → ")), tracks];
      return h("li", null, is_filter ? h("button", { class: "bar", type: "button", onclick: () => choose({ failure: kind }) }, inner) : h("div", { class: "bar" }, inner));
    }));
  }
  function failures() {
    const wrong = runs.map((run) => Object.values(run.report.failures).reduce((sum, number) => sum + number, 0));
    const has_arguments = runs.some((run) => Object.values(run.report.arg_errors || {}).some(Boolean));
    return section("failures", "Failures by kind", `${wrong.map(count).join(" → ")} wrong; each under the first kind that applies`,
      wrong.some(Boolean) ? bars("failures", true) : h("p", null, "None: every decision was right."),
      has_arguments && more("Wrong arguments of matched calls, all of them", bars("arg_errors", false)));
  }

  const is_special = (name) => /^\((no call|not offered|malformed)\)$/.test(name);
  function confusion() {
    let number = runs.length - 1, all = false;
    const place = h("div"), tabs = h("div", { class: "tabs" }), buttons = [];
    function draw() {
      const found = runs[number].report.confusion, sum = (row) => Object.values(row).reduce((total, one) => total + one, 0);
      const wrong = (name) => sum(found[name] || {}) - ((found[name] || {})[name] || 0) + Object.entries(found).reduce((total, [gold, row]) => total + (gold !== name && row[name] ? row[name] : 0), 0);
      const names = [...new Set(Object.entries(found).flatMap(([gold, row]) => [gold, ...Object.keys(row)]))];
      const normal = names.filter((name) => !is_special(name)).sort((a, b) => wrong(b) - wrong(a) || (a < b ? -1 : 1));
      const kept = new Set(all ? normal : normal.slice(0, MAX_TOOLS)), special = names.filter(is_special).sort();
      const rows = [...normal, ...special].filter((name) => found[name] && (kept.has(name) || is_special(name)));
      const columns = [...normal, ...special].filter((name) => (kept.has(name) || is_special(name)) && rows.some((gold) => found[gold][name]));
      const cell = (gold, called) => {
        const calls = found[gold][called];
        if (!calls) return h("td", { class: gold === called ? "hit" : null });
        const share = calls / sum(found[gold]), level = share > 0.5 ? 3 : share > 0.15 ? 2 : 1, is_hit = gold === called;
        const said = `gold ${plain(gold)}, called ${plain(called)}: ${calls}`;
        return h("td", { class: (is_hit ? "hit h" : "m") + level }, h("button", { type: "button", title: said, "aria-label": said, onclick: () => choose({ gold: plain(gold), called: plain(called), run: compares ? String(number) : "" }) }, count(calls)));
      };
      const name_of = (name) => h("span", { class: is_special(name) ? "special" : null, title: plain(name) }, show(name));
      place.replaceChildren(
        h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "confusion matrix" }, h("table", { class: "matrix" },
          h("thead", null, h("tr", null, h("th", { class: "corner" }, "gold ↓  called →"), columns.map((name) => h("th", { scope: "col" }, h("span", { class: "down-text" }, name_of(name)))))),
          h("tbody", null, rows.map((gold) => h("tr", null, h("th", { scope: "row" }, name_of(gold)), columns.map((called) => cell(gold, called))))))),
        h("p", { class: "soft small after" }, "Outlined cells are right. Shades are shares of the row. A number shows its samples."),
        normal.length > MAX_TOOLS ? h("button", { class: "plain small after", type: "button", onclick: () => { all = !all; draw(); } }, all ? `Show the ${MAX_TOOLS} tools that are confused most` : `Show all ${normal.length} tools`) : "");
      buttons.forEach((button, other) => button.setAttribute("aria-pressed", String(other === number)));
    }
    if (compares) for (const [other, name] of ["before", "after"].entries()) {
      buttons.push(h("button", { type: "button", onclick: () => { number = other; draw(); } }, name));
    }
    tabs.append(...buttons);
    draw();
    return section("confusion", "Which tool was called", compares ? tabs : "calls of gold, by what was called instead", place);
  }

  function survival() {
    const curves = runs.map((run) => run.report.survival || []), last = Math.max(0, ...curves.map((curve) => curve.length));
    if (last < 2) return section("survival", "Survival over decision points", "", h("p", { class: "soft" }, "Every trajectory has one decision point."));
    const width = 520, height = 234, x = (step) => 44 + ((width - 60) * step) / last, y = (share) => 14 + (height - 52) * (1 - share);
    const path = (curve) => curve.reduce((made, { step, survival: share }) => `${made}H${x(step - 0.5).toFixed(1)}V${y(share).toFixed(1)}`, `M${x(0)} ${y(1)}`) + `H${x(curve.length).toFixed(1)}`;
    const every = Math.ceil(last / 12), steps = [...Array(last).keys()].map((step) => step + 1).filter((step) => step === 1 || step % every === 0);
    const ends = curves.map((curve) => curve[curve.length - 1]);
    const chart = s("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Share of trajectories right so far; at the end ${ends.map((end) => percent(end.survival)).join(", then ")}` },
      [0, 0.25, 0.5, 0.75, 1].map((share) => [s("line", { class: "grid", x1: x(0), x2: x(last), y1: y(share), y2: y(share) }), s("text", { x: x(0) - 7, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`)]),
      steps.map((step) => s("text", { x: x(step - 0.5), y: height - 19, "text-anchor": "middle" }, String(step))),
      s("text", { x: x(last / 2), y: height - 4, "text-anchor": "middle" }, "decision point"),
      s("path", { class: "area", d: `${path(curves[curves.length - 1])}V${y(0)}H${x(0)}Z` }),
      curves.map((curve, place) => s("path", { class: "step" + (compares && !place ? " first" : ""), d: path(curve) })));
    const rows = [...Array(last).keys()].map((step) => [step + 1, ...curves.flatMap((curve) => (curve[step] ? [count(curve[step].at_risk), count(curve[step].failed), percent(curve[step].survival)] : ["", "", ""]))]);
    const head = [["decision point", "num"], ...runs.flatMap((_, place) => ["trajectories", "first failure", "right so far"].map((name) => [compares ? `${name}, ${place ? "after" : "before"}` : name, "num"]))];
    return section("survival", "Survival over decision points", "trajectories that are right so far", chart, compares && h("p", { class: "legend" }, "dashed: before · solid: after"), more("As a table", table(head, rows)));
  }

  function throughput() {
    const parts = times.map((time, place) => {
      const ranks = time.ranks || [], sum = (name) => ranks.reduce((total, rank) => total + (rank[name] || 0), 0), seconds = Math.max(0, ...ranks.map((rank) => rank.seconds || 0));
      const per = (number) => (seconds ? (number / seconds).toLocaleString("en-US", { maximumFractionDigits: number / seconds < 10 ? 2 : 0 }) : "–");
      const figure = (value, name) => h("div", null, h("b", null, value), h("span", { class: "soft small" }, name));
      const head = compares && h("h3", null, place ? "after" : "before");
      if (!ranks.length || !sum("answers")) return [head, h("p", { class: "soft" }, ranks.length ? "All answers were there already: the last start only made the report." : "Not noted.")];
      return [head, h("div", { class: "figures" },
        figure(per(sum("answers")), "answers a second"), ranks[0].tokens_written !== undefined && figure(per(sum("tokens_written")), "tokens written a second"), ranks[0].tokens_read !== undefined && figure(per(sum("tokens_read")), "prompt tokens read a second"),
        figure(count(Math.round(seconds)), "seconds"), figure(time.world_size || ranks.length, ranks.length === 1 ? "rank" : "ranks")),
        sum("answers") < samples.length && h("p", { class: "soft small" }, `Of the last start, which gave ${count(sum("answers"))} answers; the others were there.`),
        ranks.length > 1 && more("By rank", table([["rank", "num"], ...Object.keys(ranks[0]).map((name) => [name.replaceAll("_", " "), "num"])], ranks.map((rank, number) => [number, ...Object.values(rank).map((value) => (typeof value === "number" ? count(value) : String(value)))])))];
    });
    return section("throughput", "Throughput", "without loading the model", parts);
  }

  function about() {
    const names = ["model", "model_hash", "adapter", "adapter_hash", "data", "data_hash", "limit", "template_hash", "encoding"];
    const parts = runs.map(({ report }, place) => {
      const told = names.filter((name) => report[name] !== null && report[name] !== undefined).map((name) => [name, report[name]]);
      if (times[place].command) told.push(["command", times[place].command]);
      const list = (entries) => h("dl", { class: "pairs" }, entries.map(([name, value]) => [h("dt", null, name.replaceAll("_", " ")), h("dd", { class: "mono" }, show(typeof value === "string" ? value : JSON.stringify(value)))]));
      const versions = Object.entries(report.versions || {});
      return [compares && h("h3", null, place ? "after" : "before"), h("div", { class: "wide" }, list(told), versions.length > 0 && list(versions)), more("Settings", list(Object.entries(report.settings || {})))];
    });
    return section("about", "How it was made", "", compares ? h("div", { class: "sides" }, parts.map((part) => h("div", null, part))) : parts);
  }

  // ---- samples -----------------------------------------------------------------------------------------------------
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
  const tools_of = (sample) => [...new Set([...sample.gold.tools, ...sample.answers.flatMap((answer) => answer.called)].map(plain))];

  const state = {};  // of the filters, as the address has it after #
  const FILTERS = {
    change: { name: "changed or not", options: () => by_count(samples.map(change_of)), passes: (sample, value) => change_of(sample) === value, shown: compares },
    right: { name: "right or wrong", options: () => by_count(samples.map((one) => (last_of(one).right ? "right" : "wrong"))), passes: (one, value) => (last_of(one).right ? "right" : "wrong") === value, shown: !compares },
    failure: { name: "any failure", options: () => by_count(samples.flatMap((one) => [...new Set(one.answers.map((answer) => answer.failure).filter(Boolean))])), text: label, passes: (one, value) => one.answers.some((answer) => answer.failure === value) },
    tool: { name: "any tool", options: () => by_count(samples.flatMap(tools_of)), passes: (one, value) => tools_of(one).includes(value) },
    category: { name: "any category", options: () => by_count(samples.map((one) => plain(one.category)).filter(Boolean)), passes: (one, value) => plain(one.category) === value },
    status: { name: "any status", options: () => by_count(samples.flatMap((one) => [...new Set(one.answers.map((answer) => answer.status))])), text: (value) => STATUS[value] || value, passes: (one, value) => one.answers.some((answer) => answer.status === value) },
    images: { name: "with or without images", options: () => by_count(samples.map((one) => (one.num_images ? "with images" : "without images"))), passes: (one, value) => (one.num_images ? "with images" : "without images") === value },
  };
  const search = h("input", { type: "search", placeholder: "Search ids, outputs, arguments", "aria-label": "Search ids, outputs and arguments" });
  const selects = {}, list = h("ol", { class: compares ? "list compares" : "list" }), told = h("div", { class: "count", role: "status" }), pager = h("div", { class: "pager" });
  let found = [], num_shown = 0;

  function passes(sample) {
    for (const [name, filter] of Object.entries(FILTERS)) if (state[name] && !filter.passes(sample, state[name])) return false;
    if (state.gold !== undefined && state.called !== undefined) {
      const judged = state.run === undefined || state.run === "" ? sample.answers : [sample.answers[Number(state.run)]];
      if (!judged.some((answer) => answer && answer.confusion.some(([gold, called]) => plain(gold) === state.gold && plain(called) === state.called))) return false;
    }
    return !state.q || words_of(sample).includes(state.q.toLowerCase());
  }
  const key_of = (sample) => `${sample.trajectory}.${sample.turn}.${sample.sample}`;

  function write_address() {
    const parts = Object.entries(state).filter(([, value]) => value).map(([name, value]) => `${name}=${encodeURIComponent(value.toWellFormed ? value.toWellFormed() : value)}`);
    try { history.replaceState(null, "", parts.length ? "#" + parts.join("&") : "#"); } catch { /* an address that may not change */ }
  }
  function read_address() {
    for (const name of Object.keys(state)) delete state[name];
    for (const part of location.hash.slice(1).split("&")) {
      const [name, value] = part.split(/=(.*)/s);
      if (value && (Object.hasOwn(FILTERS, name) || ["q", "open", "gold", "called", "run"].includes(name))) {
        try { state[name] = decodeURIComponent(value); } catch { /* no such text */ }
      }
    }
  }
  function choose(change) {  // from a bar or a cell: that alone
    for (const name of Object.keys(state)) delete state[name];
    for (const [name, value] of Object.entries(change)) if (value) state[name] = value;
    update();
    document.getElementById("samples").scrollIntoView();
  }
  function set(name, value) {
    if (value) state[name] = value; else delete state[name];
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
      h("span", null, `${count(found.length)} of ${count(samples.length)} ${samples.length === 1 ? "sample" : "samples"}`),
      state.gold !== undefined && state.called !== undefined ? h("span", { class: "chip" }, "gold ", show(state.gold), ", called ", show(state.called)) : "",
      active ? h("button", { class: "plain small", type: "button", onclick: () => choose({}) }, "Clear filters") : "",
      found.length ? h("button", { class: "plain small", type: "button", onclick: () => { if (state.open === "all") delete state.open; else state.open = "all"; update(); } }, state.open === "all" ? "Close all" : "Open all") : "",
      h("span", { class: "keys soft small" }, h("kbd", null, "j"), " ", h("kbd", null, "k"), " next, previous · ", h("kbd", null, "Enter"), " open · ", h("kbd", null, "/"), " search"));
    list.classList.toggle("hidden", !found.length);
    const place = found.findIndex((sample) => key_of(sample) === state.open);
    do grow(); while (num_shown <= place);
    write_address();
  }
  function grow() {
    for (const sample of found.slice(num_shown, num_shown + AT_ONCE)) list.append(item(sample));
    num_shown = Math.min(found.length, num_shown + AT_ONCE);
    const rest = found.length - num_shown;
    pager.replaceChildren(rest ? h("button", { class: "plain", type: "button", onclick: grow }, `Show ${count(Math.min(AT_ONCE, rest))} more of ${count(rest)}`) : found.length ? "" : "Nothing here passes these filters.");
  }

  function badge(answer) {
    return answer.right ? h("span", { class: "badge right" }, "✓ Right") : h("span", { class: "badge wrong" }, "✗ " + label(answer.failure));
  }
  function gold_said(sample) {
    if (sample.gold.any_call) return "any call";
    return sample.gold.tools.length ? sample.gold.tools.join(", ") : "text";
  }
  const called_said = (answer) => (answer.called.length ? answer.called.join(", ") : STATUS[answer.status]);
  function item(sample) {
    const entry = h("li");
    const turn = sample.answers.length && after.num_samples > 1 ? ` · turn ${sample.turn} · answer ${sample.sample + 1}` : ` · turn ${sample.turn}`;
    const row = h("button", { class: "row", type: "button", "aria-expanded": "false", onclick: () => toggle(entry, row, sample) },
      h("span", { class: "verdicts" }, compares ? [badge(sample.answers[0]), " → ", badge(sample.answers[1])] : badge(sample.answers[0])),
      h("span", { class: "id" }, h("bdi", null, show(sample.id)), h("span", { class: "soft" }, turn)),
      h("span", { class: "calls" }, h("bdi", null, show(gold_said(sample))), " → ", h("bdi", null, show(sample.answers.map(called_said).join(" → ")))));
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

  // ---- one sample ----------------------------------------------------------------------------------------------------
  const told_value = (text, none) => (text === null ? h("span", { class: "none" }, none) : long(text));
  function compared(call) {
    const head = h("div", { class: "callname" }, call.gold === null ? h("span", { class: "soft" }, "gold has no such call") : h("bdi", null, show(call.gold)),
      call.fault && call.gold !== null && call.got !== null && h("span", null, "→ ", h("bdi", null, show(call.got))), call.gold === null && h("bdi", null, show(call.got)),
      call.fault && h("span", { class: "badge wrong" }, label(call.fault)), !call.fault && call.gold !== null && call.got === null && h("span", { class: "badge wrong" }, "not called"));
    if (!call.arguments.length) return [head, h("p", { class: "soft small" }, "without arguments")];
    let above = "";
    const rows = call.arguments.map((one) => {
      const is_inner = above !== "" && one.path !== above && (one.path.startsWith(above + ".") || one.path.startsWith(above + "["));
      if (!is_inner) above = one.path;
      const is_judged = call.gold !== null && call.got !== null && !call.fault;
      const said = one.fault ? "✗ " + label(one.fault) : is_judged && one.got !== null ? "✓" : "";
      return h("tr", { class: (one.fault ? "fault" : "") + (is_inner ? " inner" : "") }, h("td", null, show(one.path)), h("td", { "data-is": "gold" }, told_value(one.gold, "not there")),
        h("td", { "data-is": "got" }, told_value(one.got, "not there")), h("td", { class: "verdict" }, is_inner ? "differs here" : said));
    });
    return [head, h("table", { class: "args" }, h("thead", null, h("tr", null, ["argument", "gold", "got", ""].map((name) => h("th", { scope: "col" }, name)))), h("tbody", null, rows))];
  }
  const NAMED = { call: "a call that was read", unreadable: "a call that cannot be read", thought: "reasoning", token: "a control token" };
  function answered(sample, answer, title) {
    const kinds = [...new Set(answer.pieces.map((piece) => piece[0]))].filter((kind) => NAMED[kind]);
    return h("div", null,
      title && h("h3", null, title, " ", badge(answer)),
      !title && !answer.right && h("p", { class: "small soft" }, KINDS[answer.failure] ? `${label(answer.failure)}: ${KINDS[answer.failure][1]}.` : ""),
      answer.calls.length > 0 && [h("h3", null, "Calls, argument by argument"), answer.calls.map(compared)],
      h("h3", null, "Raw output"),
      h("div", { class: "said", tabindex: 0 }, answer.pieces.length ? answer.pieces.map(([kind, text]) => (kind === "text" ? long(text) : h("span", { class: kind, title: NAMED[kind] }, long(text)))) : h("span", { class: "soft" }, "(nothing)")),
      kinds.length > 0 && h("p", { class: "legend" }, kinds.map((kind) => h("span", { class: "said" }, h("span", { class: kind }, NAMED[kind])))),
      h("p", { class: "small soft" }, `${count(answer.output_tokens)} tokens, ${STATUS[answer.status]}${answer.stopped ? "" : ", ended at the token limit"}`));
  }
  function expected(sample) {
    const { gold } = sample;
    if (gold.any_call) return [h("h3", null, "Gold"), h("p", null, "Any call of an offered tool.")];
    const answers = gold.answers.length ? gold.answers : gold.text ? [gold.text] : [];
    if (gold.tools.length) return gold.text ? [h("h3", null, "Gold says beside its calls"), h("div", { class: "said" }, long(gold.text))] : null;
    return [h("h3", null, gold.answers.length > 1 ? "Gold: one of these, and no call" : "Gold: no call"), answers.map((text) => h("div", { class: "said" }, long(text)))];
  }

  const lazily = new Map();  // the blocks of trajectories and images that were read
  function lazy(id) {
    if (!lazily.has(id)) lazily.set(id, document.getElementById(id) ? block(id) : null);
    return lazily.get(id);
  }
  function picture(part) {
    const source = lazy(`image-${part.image}`), size = `${part.width} × ${part.height} pixels`;
    return source && source.startsWith("data:image/jpeg;base64,")
      ? h("figure", null, h("img", { src: source, alt: `image of the prompt, ${size}`, loading: "lazy" }), h("figcaption", null, `${size} as the model gets it, shown smaller where it is larger`))
      : h("p", { class: "soft small" }, `[an image of ${size}, not in this page]`);
  }
  function spelled(message) {
    const said = [], content = message.content;
    if (message.reasoning_content) said.push(h("div", { class: "body soft" }, long(message.reasoning_content)));
    for (const part of typeof content === "string" ? [{ type: "text", text: content }] : content) {
      if (part.type === "image") said.push(picture(part));
      else if (part.text) said.push(h("div", { class: "body" + (message.role === "tool" ? " mono" : "") }, long(part.text)));
    }
    for (const call of message.calls || []) said.push(h("div", { class: "body mono" }, long(call)));
    return said;
  }
  const turn_of = (message, number) => h("div", { class: `turn ${message.role}` }, h("div", { class: "role" }, `${number} · ${message.role}`, message.name ? [" · ", show(message.name)] : ""), spelled(message));
  function prompt_of(sample) {
    const messages = lazy(`trajectory-${sample.trajectory}`);
    if (!has_prompts) return null;
    if (!messages) return [h("h3", null, "Prompt"), h("p", { class: "soft" }, "Left out for its size; trajectories.jsonl has it.")];
    const seen = messages.slice(0, sample.turn - 1), first = Math.max(0, seen.length - 3), turns = h("div");
    turns.append(...seen.slice(first).map((message, place) => turn_of(message, first + place + 1)));
    const earlier = first > 0 && h("button", { class: "plain small", type: "button", onclick: () => { turns.prepend(...seen.slice(0, first).map((message, place) => turn_of(message, place + 1))); earlier.remove(); } }, `Show ${first} earlier ${first === 1 ? "message" : "messages"}`);
    return [h("h3", null, `Prompt, ${count(sample.prompt_tokens)} tokens`), earlier, turns];
  }
  function offered(sample) {
    const declared = tools[sample.tools] || [];
    if (!declared.length) return h("p", { class: "small soft" }, "No tools were declared.");
    const details = more(`${declared.length} ${declared.length === 1 ? "tool" : "tools"} declared: `);
    const names = declared.map((tool) => tool[0]);
    details.querySelector("summary").append(...show(names.slice(0, 8).join(", ")), names.length > 8 ? " …" : "");
    details.addEventListener("toggle", () => details.append(h("div", { class: "said" }, long(declared.map((tool) => tool[1]).join("\n\n")))), { once: true });
    return details;
  }
  function detail(sample) {
    const answers = compares ? h("div", { class: "sides" }, sample.answers.map((answer, place) => answered(sample, answer, place ? "After" : "Before"))) : answered(sample, sample.answers[0], "");
    const facts = [sample.category && `category ${sample.category}`, sample.pair && `pair ${sample.pair}`, sample.num_images && `${sample.num_images} ${sample.num_images === 1 ? "image" : "images"}`, `trajectory ${sample.trajectory}`].filter(Boolean);
    return h("div", { class: "detail" }, answers, expected(sample), prompt_of(sample), offered(sample), h("p", { class: "small soft" }, show(facts.join(" · "))));
  }

  function sample_list() {
    const bar = h("div", { class: "filters" }, search);
    for (const [name, filter] of Object.entries(FILTERS)) {
      const options = filter.options();
      if (filter.shown === false || options.length < 2) continue;
      selects[name] = h("select", { "aria-label": filter.name, onchange: (event) => set(name, event.target.value) }, h("option", { value: "" }, filter.name),
        options.map(([value, number]) => h("option", { value }, `${filter.text ? filter.text(value) : value} (${count(number)})`)));
      bar.append(selects[name]);
    }
    let wait = 0;
    search.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => set("q", search.value), 150); });
    return h("section", { id: "samples", tabindex: -1 }, h("h2", null, "Samples"), bar, told, list, pager);
  }

  function keys(event) {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing) document.activeElement.blur();
    if (typing) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); }
    if (event.key === "j" || event.key === "k") {
      const rows = [...list.querySelectorAll(".row")], at = rows.indexOf(document.activeElement.closest ? document.activeElement.closest("li")?.querySelector(".row") : null);
      const next = rows[at < 0 ? 0 : at + (event.key === "j" ? 1 : -1)];
      if (next) { next.focus(); next.scrollIntoView({ block: "center" }); }
    }
  }

  const jumps = [["overview", "Overview"], ["failures", "Failures"], ["confusion", "Confusion"], ["survival", "Survival"], ["throughput", "Throughput"], ["about", "How it was made"], ["samples", "Samples"]];
  document.body.classList.toggle("comparison", compares);
  document.getElementById("page").append(
    top(),
    h("nav", { class: "jump", "aria-label": "Parts of the page" }, jumps.map(([id, name]) => h("button", { type: "button", onclick: () => { const part = document.getElementById(id); part.scrollIntoView(); part.focus({ preventScroll: true }); } }, name))),
    ...notices(), verdict() || "", cards(),
    h("section", { class: "card" }, all_metrics(), slices() || ""),
    h("div", { class: "two" }, h("div", null, failures()), h("div", null, survival(), throughput())), confusion(), about(), sample_list(),
    h("footer", { class: "bottom" }, "Made by gemma-dist. docs/evaluation.md defines every number."));
  document.addEventListener("keydown", keys);
  window.addEventListener("hashchange", () => { read_address(); update(); });
  read_address();
  update();
  document.documentElement.dataset.ready = String(samples.length);
})();
