// The page, put together.
function sample_list() {
  const bar = h("div", { class: "filters" }, search);
  for (const [name, filter] of Object.entries(FILTERS)) {
    const options = filter.options();
    if (filter.shown === false || options.length < 2) continue;
    selects[name] = h(
      "select",
      { "aria-label": filter.name, onchange: (event) => set(name, event.target.value) },
      h("option", { value: "" }, filter.name),
      options.map(([value, number]) =>
        h("option", { value }, `${filter.text ? filter.text(value) : value} (${count(number)})`),
      ),
    );
    bar.append(selects[name]);
  }
  let wait = 0;
  search.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(() => set("q", search.value), 150);
  });
  return h("section", { id: "samples", tabindex: -1 }, h("h2", null, "Samples"), bar, told, list, pager);
}

function keys(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && typing) document.activeElement.blur();
  if (typing) return;
  if (event.key === "/") {
    event.preventDefault();
    search.focus();
  }
  if (event.key === "j" || event.key === "k") {
    const rows = [...list.querySelectorAll(".row")],
      at = rows.indexOf(
        document.activeElement.closest ? document.activeElement.closest("li")?.querySelector(".row") : null,
      );
    const next = rows[at < 0 ? 0 : at + (event.key === "j" ? 1 : -1)];
    if (next) {
      next.focus();
      next.scrollIntoView({ block: "center" });
    }
  }
}

const jumps = [
  ["overview", "Overview"],
  ["failures", "Failures"],
  ["confusion", "Confusion"],
  ["survival", "Survival"],
  ["throughput", "Throughput"],
  ["about", "How it was made"],
  ["samples", "Samples"],
];
document.body.classList.toggle("comparison", compares);
document.getElementById("page").append(
  top(),
  h(
    "nav",
    { class: "jump", "aria-label": "Parts of the page" },
    jumps.map(([id, name]) =>
      h(
        "button",
        {
          type: "button",
          onclick: () => {
            const part = document.getElementById(id);
            part.scrollIntoView();
            part.focus({ preventScroll: true });
          },
        },
        name,
      ),
    ),
  ),
  ...notices(),
  verdict() || "",
  cards(),
  h("section", { class: "card" }, beside() || "", all_metrics(), slices() || ""),
  h("div", { class: "two" }, h("div", null, failures()), h("div", null, survival(), throughput())),
  confusion(),
  about(),
  sample_list(),
  h("footer", { class: "bottom" }, "Made by gemma-dist. docs/evaluation.md defines every number."),
);
document.addEventListener("keydown", keys);
window.addEventListener("hashchange", () => {
  read_address();
  update();
});
read_address();
update();
document.documentElement.dataset.ready = String(samples.length);
document.documentElement.dataset.seconds = (performance.now() / 1000).toFixed(2); // since the page was asked for
