// One sample, open.
const told_value = (text, none) => (text === null ? h("span", { class: "none" }, none) : long(text));
function compared(call) {
  const head = h(
    "div",
    { class: "callname" },
    call.gold === null ? h("span", { class: "soft" }, "gold has no such call") : h("bdi", null, show(call.gold)),
    call.fault && call.gold !== null && call.got !== null && h("span", null, "→ ", h("bdi", null, show(call.got))),
    call.gold === null && h("bdi", null, show(call.got)),
    call.fault && h("span", { class: "badge wrong" }, label(call.fault)),
    !call.fault && call.gold !== null && call.got === null && h("span", { class: "badge wrong" }, "not called"),
  );
  if (!call.arguments.length) return [head, h("p", { class: "soft small" }, "without arguments")];
  let above = "";
  const rows = call.arguments.map((one) => {
    const is_inner =
      above !== "" && one.path !== above && (one.path.startsWith(above + ".") || one.path.startsWith(above + "["));
    if (!is_inner) above = one.path;
    const is_judged = call.gold !== null && call.got !== null && !call.fault;
    const said = one.fault ? "✗ " + label(one.fault) : is_judged && one.got !== null ? "✓" : "";
    return h(
      "tr",
      { class: (one.fault ? "fault" : "") + (is_inner ? " inner" : "") },
      h("td", null, show(one.path)),
      h("td", { "data-is": "gold" }, told_value(one.gold, "not there")),
      h("td", { "data-is": "got" }, told_value(one.got, "not there")),
      h("td", { class: "verdict" }, is_inner ? "differs here" : said),
    );
  });
  return [
    head,
    h(
      "table",
      { class: "args" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ["argument", "gold", "got", ""].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h("tbody", null, rows),
    ),
  ];
}
const NAMED = {
  call: "a call that was read",
  unreadable: "a call that cannot be read",
  thought: "reasoning",
  token: "a control token",
};
function answered(sample, answer, title) {
  const kinds = [...new Set(answer.pieces.map((piece) => piece[0]))].filter((kind) => NAMED[kind]);
  return h(
    "div",
    null,
    title && h("h3", null, title, " ", badge(answer)),
    !title &&
      !answer.right &&
      h(
        "p",
        { class: "small soft" },
        KINDS[answer.failure] ? `${label(answer.failure)}: ${KINDS[answer.failure][1]}.` : "",
      ),
    answer.calls.length > 0 && [h("h3", null, "Calls, argument by argument"), answer.calls.map(compared)],
    h("h3", null, "Raw output"),
    h(
      "div",
      { class: "said", tabindex: 0 },
      answer.pieces.length
        ? answer.pieces.map(([kind, text]) =>
            kind === "text" ? long(text) : h("span", { class: kind, title: NAMED[kind] }, long(text)),
          )
        : h("span", { class: "soft" }, "(nothing)"),
    ),
    kinds.length > 0 &&
      h(
        "p",
        { class: "legend" },
        kinds.map((kind) => h("span", { class: "said" }, h("span", { class: kind }, NAMED[kind]))),
      ),
    h(
      "p",
      { class: "small soft" },
      `${count(answer.output_tokens)} tokens, ${STATUS[answer.status]}` +
        (answer.stopped ? "" : ", ended at the token limit"),
    ),
  );
}
function expected(sample) {
  const { gold } = sample;
  if (gold.any_call) return [h("h3", null, "Gold"), h("p", null, "Any call of an offered tool.")];
  const answers = gold.answers.length ? gold.answers : gold.text ? [gold.text] : [];
  if (gold.tools.length)
    return gold.text
      ? [h("h3", null, "Gold says beside its calls"), h("div", { class: "said" }, long(gold.text))]
      : null;
  return [
    h("h3", null, gold.answers.length > 1 ? "Gold: one of these, and no call" : "Gold: no call"),
    answers.map((text) => h("div", { class: "said" }, long(text))),
  ];
}

const lazily = new Map(); // the blocks of tools, trajectories and images that were read
function lazy(id) {
  if (!lazily.has(id)) lazily.set(id, document.getElementById(id) ? block(id) : null);
  return lazily.get(id);
}
function picture(part) {
  const source = lazy(`image-${part.image}`),
    size = `${part.width} × ${part.height} pixels`;
  return source && source.startsWith("data:image/jpeg;base64,")
    ? h(
        "figure",
        null,
        h("img", { src: source, alt: `image of the prompt, ${size}`, loading: "lazy" }),
        h("figcaption", null, `${size} as the model gets it, shown smaller where it is larger`),
      )
    : h("p", { class: "soft small" }, `[an image of ${size}, not in this page]`);
}
function spelled(message) {
  const said = [],
    content = message.content;
  if (message.reasoning_content) said.push(h("div", { class: "body soft" }, long(message.reasoning_content)));
  for (const part of typeof content === "string" ? [{ type: "text", text: content }] : content) {
    if (part.type === "image") said.push(picture(part));
    else if (part.text)
      said.push(h("div", { class: "body" + (message.role === "tool" ? " mono" : "") }, long(part.text)));
  }
  for (const call of message.calls || []) said.push(h("div", { class: "body mono" }, long(call)));
  return said;
}
const turn_of = (message, number) =>
  h(
    "div",
    { class: `turn ${message.role}` },
    h("div", { class: "role" }, `${number} · ${message.role}`, message.name ? [" · ", show(message.name)] : ""),
    spelled(message),
  );
function prompt_of(sample) {
  const messages = lazy(`trajectory-${sample.trajectory}`);
  if (!has_prompts) return null;
  if (!messages)
    return [h("h3", null, "Prompt"), h("p", { class: "soft" }, "Left out for its size; trajectories.jsonl has it.")];
  const seen = messages.slice(0, sample.turn - 1),
    first = Math.max(0, seen.length - 3),
    turns = h("div");
  turns.append(...seen.slice(first).map((message, place) => turn_of(message, first + place + 1)));
  const earlier =
    first > 0 &&
    h(
      "button",
      {
        class: "plain small",
        type: "button",
        onclick: () => {
          turns.prepend(...seen.slice(0, first).map((message, place) => turn_of(message, place + 1)));
          earlier.remove();
        },
      },
      `Show ${first} earlier ${first === 1 ? "message" : "messages"}`,
    );
  return [h("h3", null, `Prompt, ${count(sample.prompt_tokens)} tokens`), earlier, turns];
}
function offered(sample) {
  const declared = lazy(`tools-${sample.tools}`);
  if (!declared) return h("p", { class: "small soft" }, "Its tools are left out for their size; tools.json has them.");
  if (!declared.length) return h("p", { class: "small soft" }, "No tools were declared.");
  const details = more(`${declared.length} ${declared.length === 1 ? "tool" : "tools"} declared: `);
  const names = declared.map((tool) => tool[0]);
  details.querySelector("summary").append(...show(names.slice(0, 8).join(", ")), names.length > 8 ? " …" : "");
  details.addEventListener(
    "toggle",
    () => details.append(h("div", { class: "said" }, long(declared.map((tool) => tool[1]).join("\n\n")))),
    { once: true },
  );
  return details;
}
function detail(sample) {
  const answers = compares
    ? h(
        "div",
        { class: "sides" },
        sample.answers.map((answer, place) => answered(sample, answer, place ? "After" : "Before")),
      )
    : answered(sample, sample.answers[0], "");
  const facts = [
    sample.category && `category ${sample.category}`,
    sample.pair && `pair ${sample.pair}`,
    sample.num_images && `${sample.num_images} ${sample.num_images === 1 ? "image" : "images"}`,
    `trajectory ${sample.trajectory}`,
  ].filter(Boolean);
  return h(
    "div",
    { class: "detail" },
    answers,
    expected(sample),
    prompt_of(sample),
    offered(sample),
    h("p", { class: "small soft" }, show(facts.join(" · "))),
  );
}
