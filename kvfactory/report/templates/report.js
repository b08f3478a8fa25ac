// Tables that sort, and filters; the example browser of examples.js is opened at the end. What comes from data is only ever
// put in as text.

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const inOrder = new Intl.Collator("en", { numeric: true }).compare;

/** An element with properties and children; a string among them becomes text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A select or an input under its name. */
function labelled(name, control) {
  return make("label", {}, name, control);
}

/** Give a select these [value, text] options and choose a value of them: the first of those wanted that is there. */
function fill(select, options, ...wanted) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  const values = options.map(([value]) => value);
  select.value = [...wanted, values[0]].find((each) => values.includes(each)) ?? "";
}

// -- tables ----------------------------------------------------------------------------------------------------------

/** What a cell sorts by: a number, null where there is none, or its text. */
function sortKey(cell) {
  const value = cell.dataset.value;
  if (value === undefined) return cell.textContent.trim();
  return value === "" ? null : Number(value);
}

function compare(one, other, falling) {
  if (one === null || other === null) return (one === null) - (other === null);
  const order = typeof one === "number" ? one - other : inOrder(one, other);
  return falling ? -order : order;
}

function sortTable(table, place) {
  const headings = [...table.tHead.rows[0].cells];
  const falling = headings[place].getAttribute("aria-sort") === "ascending";
  for (const heading of headings) heading.removeAttribute("aria-sort");
  headings[place].setAttribute("aria-sort", falling ? "descending" : "ascending");
  const keyed = [...table.tBodies[0].rows].map((row) => [sortKey(row.cells[place]), row]);
  keyed.sort(([one], [other]) => compare(one, other, falling));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const table of all("main table")) {
  [...table.tHead.rows[0].cells].forEach((heading, place) => {
    const button = make("button", { type: "button" }, ...heading.childNodes);
    button.addEventListener("click", () => sortTable(table, place));
    heading.replaceChildren(button);
  });
}

// -- filters ---------------------------------------------------------------------------------------------------------

const NAMES = ["benchmark", "method", "budget"];
const filters = { benchmark: "", method: "", budget: "", words: [] };

/** Whether something may be seen that is `about` a benchmark, and maybe a group, method and budget. */
function passes(about) {
  if (NAMES.some((name) => filters[name] && about[name] && about[name] !== filters[name])) return false;
  if (!about.method) return true;
  const text = [about.benchmark, about.group, about.method, about.budget].join(" ").toLowerCase();
  return filters.words.every((word) => text.includes(word));
}

function countLines(table) {
  const rows = [...table.tBodies[0].rows];
  const shown = rows.filter((row) => !row.hidden).length;
  return shown === rows.length ? `${shown} lines` : `${shown} of ${rows.length} lines`;
}

function applyFilters() {
  for (const element of all("[data-benchmark]")) element.hidden = !passes(element.dataset);
  for (const table of all("main table")) table.caption.querySelector(".count").textContent = countLines(table);
  const rows = all("main tbody tr");
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("filter-count").textContent = `${shown} of ${rows.length} lines are shown`;
  browser.update();
}

function makeFilters() {
  const bar = document.getElementById("filters");
  for (const name of NAMES) {
    const rows = all("main tbody tr");
    const values = [...new Set(rows.map((row) => row.dataset[name]))];
    if (name === "budget") values.sort((one, other) => (one === "full") - (other === "full") || inOrder(one, other));
    const select = make("select", { id: `filter-${name}` });
    fill(select, [["", "all"], ...values.map((value) => [value, value])]);
    select.addEventListener("change", () => {
      filters[name] = select.value;
      applyFilters();
    });
    bar.append(labelled(name, select));
  }
  const search = make("input", { type: "search", id: "filter-words", placeholder: "part of a name" });
  search.addEventListener("input", () => {
    filters.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    applyFilters();
  });
  bar.append(labelled("search", search), make("p", { id: "filter-count", role: "status" }));
}

// -- beginning --------------------------------------------------------------------------------------------------------

const section = document.getElementById("examples");
const browser = section ? new Browser(section) : { update() {} };
makeFilters();
applyFilters();
if (section) {
  const asks = () => new URLSearchParams(location.hash.slice(1)).has("example");
  const goThere = async () => {
    await browser.open();
    browser.follow();
    section.scrollIntoView();
  };
  const seen = (entries) => entries.some((each) => each.isIntersecting) && browser.open();
  new IntersectionObserver(seen, { rootMargin: "300px" }).observe(section);
  window.addEventListener("hashchange", () => asks() && goThere());
  if (asks()) goThere();
}
