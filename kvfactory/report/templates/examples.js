"use strict";
// The example browser: data that is unpacked when it is needed, choices, and an article. report.js comes behind this, in the
// same script, and has what makes elements and filters.

/** Base64 of gzipped JSON, as the page holds it, to what it was. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const EIGHTHS = Array.from({ length: 8 }, (_, eighth) => `kept by ${eighth}/8 to ${eighth + 1}/8 of the heads`);
const LEVELS = ["kept by no head", ...EIGHTHS, "kept by every head"];

const number = (value) => value.toLocaleString("en");

/** The texts of tokens, those next to each other that were kept alike in one element. */
function shaded(tokens, levels) {
  const parts = [];
  tokens.forEach((token, place) => {
    const level = levels[place] ?? "";
    if (parts.length && parts.at(-1).level === level) parts.at(-1).text += token;
    else parts.push({ level, text: token });
  });
  return parts.map(({ level, text }) => make("span", level && { className: `k${level}`, title: LEVELS[level] }, text));
}

class Browser {
  constructor(section) {
    this.section = section;
    this.article = section.querySelector("article");
    this.status = document.getElementById("example-status");
    this.controls = {};
    for (const name of ["benchmark", "group", "example", "left", "right"]) {
      this.controls[name] = make("select", { id: `choose-${name}` });
      this.controls[name].addEventListener("change", () => this.update({ remember: true }));
    }
    for (const name of ["differ", "wrong"]) {
      this.controls[name] = make("input", { type: "checkbox", id: `only-${name}` });
      this.controls[name].addEventListener("change", () => this.update({ remember: true }));
    }
    this.steps = [["previous", -1], ["next", 1]].map(([name, by]) => {
      const button = make("button", { type: "button", id: `${name}-example` }, name);
      button.addEventListener("click", () => this.step(by));
      return button;
    });
  }

  /** Unpack the data, once, and show what the address asks for, or the first example. */
  async open() {
    if (this.items) return;
    this.items = [];
    this.status.textContent = "Unpacking examples";
    try {
      const items = await unpack(document.getElementById("examples-data").textContent);
      for (const item of items) {
        item.groups = [...new Set(item.examples.map((each) => each.group))];
        item.examples.sort((one, other) => inOrder(one.id, other.id));
      }
      this.items = items;
    } catch (problem) {
      this.status.textContent = `This browser cannot unpack the examples: ${problem.message}`;
      return;
    }
    const { benchmark, group, example, left, right, differ, wrong } = this.controls;
    const check = (input, text) => make("label", { className: "check" }, input, text);
    document.getElementById("example-controls").append(
      labelled("benchmark", benchmark),
      labelled("group", group),
      labelled("example", example),
      make("div", { className: "steps" }, ...this.steps),
      labelled("left", left),
      labelled("right", right),
      check(differ, "only where the two answers differ"),
      check(wrong, "only wrong ones (a score below 1)"),
    );
    this.section.classList.add("open");
    this.follow();
  }

  /** Show what the address asks for. */
  follow() {
    const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    this.update({ wanted: asked.example ? asked : {} });
  }

  /** Go on by so many examples. */
  step(by) {
    const { example } = this.controls;
    example.selectedIndex += by;
    this.update({ remember: true });
  }

  /** Bring choices, address and article in line; `wanted` names choices to make, if they are there. */
  update({ wanted = {}, remember = false } = {}) {
    if (!this.items?.length) return;
    const { benchmark, group, example, left, right } = this.controls;
    const choose = (select, values, first, texts = values) => {
      const options = values.map((value, place) => [value, texts[place]]);
      fill(select, options, wanted[select.id.slice("choose-".length)], select.value, first);
    };
    choose(benchmark, this.items.map((item) => item.benchmark).filter((name) => passes({ benchmark: name })));
    this.item = this.items.find((item) => item.benchmark === benchmark.value);
    if (wanted.example) this.controls.differ.checked = this.controls.wrong.checked = false;
    const groups = this.item?.groups ?? [];
    choose(group, ["", ...groups], "", ["all", ...groups]);
    if (wanted.example) group.value = "";
    const names = this.configurations(groups);
    choose(left, names, names[0]);
    choose(right, names, names[1]);
    const found = this.found();
    choose(example, found.map((each) => each.id));
    this.steps[0].disabled = example.selectedIndex <= 0;
    this.steps[1].disabled = example.selectedIndex >= found.length - 1;
    this.status.textContent = this.told(found, wanted.example);
    this.article.replaceChildren(...(found.length ? this.show(found[example.selectedIndex]) : []));
    for (const prompt of all(".prompt", this.article)) prompt.scrollTop = prompt.scrollHeight;
    if (remember && found.length) this.remember();
  }

  /** Which example it is, of how many, and whether the wanted one is missing. */
  told(found, wanted) {
    const { example } = this.controls;
    if (!found.length) return "No example is like that; change the choices or the filters.";
    const place = `Example ${example.selectedIndex + 1} of ${found.length}`;
    return wanted && wanted !== example.value ? `There is no example ${wanted} here. ${place}` : place;
  }

  /** Put what is chosen into the address. */
  remember() {
    const names = ["benchmark", "example", "left", "right"];
    const chosen = Object.fromEntries(names.map((name) => [name, this.controls[name].value]));
    history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
  }

  /** The names of configurations that the filters let through. */
  configurations(groups) {
    const { benchmark, configurations = [] } = this.item ?? {};
    const about = { benchmark, group: groups.join(" ") };
    return configurations.filter(([method, budget]) => passes({ ...about, method, budget })).map((each) => each.join(" @ "));
  }

  /** An example's rows of the two configurations; undefined or null where there is none. */
  pair(example) {
    const names = this.item.configurations.map((each) => each.join(" @ "));
    return [this.controls.left, this.controls.right].map((select) => example.rows[names.indexOf(select.value)]);
  }

  /** The examples that the choices let through. */
  found() {
    const { group, differ, wrong } = this.controls;
    return (this.item?.examples ?? []).filter((example) => {
      const [one, other] = this.pair(example);
      if ((group.value && example.group !== group.value) || !(one || other)) return false;
      if (differ.checked && one?.prediction === other?.prediction) return false;
      return !wrong.checked || [one, other].some((row) => row?.scores.score < 1);
    });
  }

  /** The elements that an example is shown with. */
  show(example) {
    const facts = make("dl");
    const tell = (name, ...values) => facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...values)));
    tell("group", example.group);
    if (example.after) tell("after", this.link(example.after));
    if (example.question) tell("question, read after compression", make("div", { className: "text" }, example.question));
    tell("right answers", ...example.answers.map((answer) => make("div", { className: "text" }, answer)));
    const pair = make("div", { className: "pair" });
    const names = [this.controls.left.value, this.controls.right.value];
    this.pair(example).forEach((row, place) => pair.append(this.answer(example, row, names[place])));
    const prompts = all(".prompt", pair);
    for (const prompt of prompts) {
      prompt.addEventListener("scroll", () => prompts.forEach((other) => (other.scrollTop = prompt.scrollTop)));
    }
    return [make("h3", {}, example.id), facts, ...this.legend(example), pair];
  }

  /** A link to another example of the benchmark. */
  link(id) {
    return make("a", { href: `#${new URLSearchParams({ benchmark: this.item.benchmark, example: id })}` }, id);
  }

  /** What the shades mean, or why there are none. */
  legend(example) {
    if (!this.item.texts.length) return [make("p", {}, "This run did not record its prompts.")];
    if (example.text === null) return [make("p", {}, "This prompt was not recorded.")];
    const swatch = (level) => make("span", { className: `k${level}` }, "token");
    const parts = [[0, "no head kept it"], [1, "few heads did"], [4, "half of them"], [8, "nearly all"], [9, "all"]];
    return [make("div", { className: "kept" }, ...parts.map(([level, text]) => make("div", {}, swatch(level), text)))];
  }

  /** One configuration's answer, and what it kept. */
  answer(example, row, name) {
    const box = make("section", { className: "answer" }, make("h3", {}, name));
    if (!row) {
      box.append(make("p", {}, "There is no row of this example here."));
      return box;
    }
    const scores = Object.entries(row.scores).map(([score, value]) => `${score} ${value?.toFixed(2) ?? "–"}`);
    box.append(
      make("p", {}, scores.join(", ")),
      make("h4", {}, "Prediction"),
      make("div", { className: "text prediction" }, row.prediction || "(empty)"),
    );
    if (example.text !== null) box.append(...this.prompt(example, row));
    return box;
  }

  /** The recorded text of the prompt, shaded by how many heads kept each token. */
  prompt(example, row) {
    const [begin, end] = this.item.texts[example.text];
    if (!begin.length) return [];
    const unseen = example.tokens - begin.length - end.length;
    const gap = make("span", { className: "gap" }, `${number(unseen)} tokens are not recorded`);
    const kept = row.kept_tokens == null ? "" : `, ${number(row.kept_tokens)} of ${number(example.tokens)} tokens kept`;
    const levels = row.kept ?? "";
    const note = row.kept ? "" : "; which of them was not recorded";
    const text = make("div", { className: "text prompt", tabIndex: 0 });
    text.setAttribute("role", "region");
    text.setAttribute("aria-label", "Prompt");
    text.append(...shaded(begin, levels.slice(0, begin.length)));
    if (unseen > 0) text.append(gap);
    text.append(...shaded(end, levels.slice(begin.length)));
    return [make("h4", {}, `Prompt${kept}${note}`), text];
  }
}
