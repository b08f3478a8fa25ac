"""The report page: its numbers are those of the tables, its marks are earned, and what was written never becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
from kvfactory_runners.report import report_command
from rows import make_row

from kvfactory.errors import UserError
from kvfactory.folder_format import budget_number
from kvfactory.report.examples import examples_of, packed, unpacked
from kvfactory.report.page import render
from kvfactory.report.page_tables import PageTable, by_group, every_number, leaderboard
from kvfactory.report.sections import labelled, sections_of
from kvfactory.report.tables import overall, summarise, wide
from kvfactory.results import Run


def answered(example: str, method: str, budget: int | None, score: float, **fields: object) -> dict:
    """A row of an example that other configurations have too."""
    known = {"example_id": example, "prediction": f"{method} says {score}", "answers": ["yes"]}
    known |= {} if budget or "budget_share" in fields else {"ratio": 1.0}
    return make_row(example.partition("/")[0], method, budget, score, **known | fields)


def run_of(path: Path, rows: list[dict], prompts: list[dict] | None = None, kept: list[dict] | None = None) -> Run:
    """A run whose folder has what was recorded of its prompts."""
    for name, lines in (("prompts.jsonl", prompts), ("kept.jsonl", kept)):
        if lines is not None:
            path.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    settings = {"model": "tiny/model", "dtype": "float32", "style": "<i>odd</i>"}
    session = {"started": "2025-02-03T04:05:06+00:00", "environment": {"kvfactory": "0.1.0", "device_of_model": "cpu"}}
    return Run(path, rows, settings, [session])


def sections(*rows: dict, path: Path = Path("run")) -> list:
    return sections_of(labelled([Run(path, list(rows), {}, [])]))


def prompt(example: str, begin: list[str], end: list[str], **fields: object) -> dict:
    known = {"tokens": len(begin) + len(end), "question": "", "after": None, "shared_with": None}
    return {"example_id": example, "begin": begin, "end": end} | known | fields


def cells(table: PageTable, method: str, budget: object) -> dict[str, str]:
    """A line's texts by heading, the marks of a cell in front of it."""
    (line,) = [each for each in table.lines if (each.about["method"], each.about["budget"]) == (method, str(budget))]
    texts = [" ".join([*cell.marks, cell.text]).strip() for cell in line.cells]
    return dict(zip([column.heading for column in table.columns], texts, strict=True))


def _line(table: PageTable, method: str) -> tuple[list, list]:
    (line,) = [each for each in table.lines if each.about["method"] == method]
    return list(table.columns), list(line.cells)


class Parsed(HTMLParser):
    """Elements of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.texts.append((self.elements[-1][0], data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def inside(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag and text.strip()]


# -- tables ----------------------------------------------------------------------------------------------------------


def test_the_leaderboard_says_what_the_averages_say():
    scores = {"fullkv": (1.0, 1.0, 0.5, 0.25), "h2o": (0.0, 0.5, 0.5, 0.0)}
    rows = [
        answered(f"{group}/{number}", method, None if method == "fullkv" else 64, score, cache_bytes=3 * 2**19)
        for method, each in scores.items()
        for group in ("qa", "code")
        for number, score in enumerate(each if group == "qa" else each[:3])
    ]
    table, frame = leaderboard(sections(*rows)), overall(rows)
    assert len(table.lines) == len(frame) == 2
    (line,) = [each for each in frame.to_dict("records") if each["method"] == "h2o"]
    found = cells(table, "h2o", 64)
    assert found["score"] == f"{line['score']:.2f}" == "29.16"  # of 25 and 33.33
    assert found["95 % interval"] == f"[{line['score_low']:.1f}, {line['score_high']:.1f}]"
    assert found["difference"] == f"{line['score_difference']:+.2f}".replace("-", "−")
    signed = f"[{line['score_difference_low']:+.1f}, {line['score_difference_high']:+.1f}]"
    assert found["its 95 % interval"] == signed.replace("-", "−")
    assert (found["groups"], found["examples"], found["kept tokens"]) == ("2", "7", "64.0")
    assert (found["cache MiB"], found["of full"], found["evicted"], found["seconds"]) == (
        "1.50",
        "25.0%",
        "always",
        "3.50",
    )


def test_a_benchmark_of_one_group_stands_there_as_it_is():
    rows = [answered(f"qa/{number}", "h2o", 64, number / 4) for number in range(4)]
    found = cells(leaderboard(sections(*rows)), "h2o", 64)
    assert found["score"] == f"{summarise(rows)['score'][0]:.2f}" == "37.50"
    assert found["groups"] == "1"


def test_differences_are_marked_where_examples_do_not_tell_them_from_zero():
    full = [answered(f"qa/{number}", "fullkv", None, 0.5) for number in range(8)]
    same = [answered(f"qa/{number}", "h2o", 64, 0.5 + 0.1 * (-1) ** number) for number in range(8)]
    worse = [answered(f"qa/{number}", "h2o", 16, 0.1 + 0.1 * (number % 2)) for number in range(8)]
    (section,) = sections(*full, *({**row, "rougeL": 0.5, "scores": ["score", "rougeL"]} for row in same))
    marked = [
        column.heading for column, cell in zip(*_line(every_number(section), "fullkv"), strict=True) if cell.marks
    ]
    assert marked == ["difference"], "and not where the baseline has no such score"
    table = leaderboard(sections(*full, *same, *worse))
    assert cells(table, "fullkv", "full")["difference"] == "baseline"
    assert cells(table, "h2o", 64)["difference"] == "≈ +0.00"
    assert cells(table, "h2o", 16)["difference"] == "−35.00"
    assert set(table.marks) == {"baseline", "≈"}, "the legend has the marks that are there and no others"


def test_lines_that_say_nothing_of_compression_or_memory_are_marked():
    rows = [
        answered("qa/1", "short", 4096, 1.0, evicted=False, ratio=1.0),
        answered("qa/1", "mask", 64, 1.0, memory="nominal", ratio=1.0),
        answered("qa/1", "lacking", 64, 1.0),
        *(answered("code/1", method, budget, 1.0) for method, budget in (("short", 4096), ("mask", 64))),
        answered("qa/1", "fullkv", None, 0.1, ability=0.5, evicted=False),
        answered("code/1", "fullkv", None, 1.0, ability=0.5, evicted=False),
    ]
    table = leaderboard(sections(*rows))
    assert cells(table, "short", 4096)["evicted"] == "50%"
    assert cells(table, "mask", 64)["cache MiB"] == "nominal 1.00"
    assert cells(table, "lacking", 64)["score"] == "incomplete"
    assert cells(table, "fullkv", "full")["benchmark"] == "beyond model longbench"
    group = every_number(sections(*rows[:2])[0])
    assert cells(group, "short", 4096)["evicted"] == "never"
    assert cells(group, "short", 4096)["of full"] == "", "no compression, so no share"


def test_scores_by_group_are_those_of_the_wide_table():
    rows = [answered(f"{group}/{n}", "h2o", 64, n / 3) for group in ("qa", "code") for n in range(3)]
    rows.append(answered("qa/1", "fullkv", None, 0.75))
    (section,) = sections(*rows)
    table = by_group(section)
    assert [column.heading for column in table.columns] == list(wide(rows).columns)
    assert cells(table, "h2o", 64) == {
        "method": "h2o",
        "budget": "64",
        "qa": "33.33",
        "code": "33.33",
        "average": "33.33",
    }
    lacking = cells(table, "fullkv", "full")
    assert (lacking["qa"], lacking["code"], lacking["average"]) == ("75.00", "", "")


def test_columns_without_anything_are_left_out():
    bare = {"benchmark": "longbench", "group": "qa", "method": "h2o", "budget": 64, "score": 0.5, "scores": ["score"]}
    (section,) = sections(*({**bare, "example_id": f"qa/{n}"} for n in range(3)))
    assert [column.heading for column in leaderboard([section]).columns] == [
        "benchmark",
        "groups",
        "method",
        "budget",
        "examples",
        "score",
        "95 % interval",
    ]


def test_perplexities_and_latencies_have_tables_of_their_own_and_no_place_on_the_leaderboard():
    windows = [
        {**make_row("novel", "h2o", 64, 0.0, nll=1.0 + n, perplexity=2.0, scored_tokens=10), "benchmark": "perplexity"}
        for n in range(2)
    ]
    times = [{**make_row("1024", "h2o", 64, 0.0, ttft_seconds=0.25, oom=False), "benchmark": "latency"}]
    times += [{**make_row("1024", "tova", 64, 0.0, oom=True), "benchmark": "latency"}]
    for row in windows + times:
        del row["score"], row["scores"]
    first, second = sections(*windows, *times)
    assert leaderboard([first, second]).lines == []
    assert cells(every_number(first), "h2o", 64)["perplexity"] == "4.48"  # exp of 1.5, not the mean
    assert cells(every_number(first), "h2o", 64)["nats"] == "1.5000"
    found = cells(every_number(second), "h2o", 64)
    assert found["first token s"] == "0.250" and "perplexity" not in found
    assert cells(every_number(second), "tova", 64)["first token s"] == "oom"


def test_budgets_sort_as_numbers_shares_behind_entries_and_everything_last():
    budgets = ["full", "5%", 1024, "12.5%", 64, 128]
    assert sorted(budgets, key=budget_number) == [64, 128, 1024, "5%", "12.5%", "full"]


# -- runs that share a benchmark -------------------------------------------------------------------------------------


def test_two_runs_of_one_benchmark_stand_side_by_side_and_are_not_mixed(tmp_path):
    runs = [
        run_of(tmp_path / name / "needle", [answered("a/1", "h2o", 64, score, benchmark="needle")])
        for name, score in (("llama", 1.0), ("qwen", 0.0))
    ]
    runs.append(run_of(tmp_path / "ruler", [answered("a/1", "h2o", 64, 0.5, benchmark="ruler")]))
    assert list(labelled(runs)) == ["llama/needle", "qwen/needle", "ruler"]
    found = sections_of(labelled(runs))
    assert [section.name for section in found] == ["needle (llama/needle)", "needle (qwen/needle)", "ruler"]
    lines = leaderboard(found).lines
    assert [line.about["benchmark"] for line in lines] == [section.name for section in found]
    assert [line.cells[5].text for line in lines] == ["100.00", "0.00", "50.00"]
    shown = examples_of(found)
    assert [item["examples"][0]["rows"][0]["prediction"] for item in shown] == [
        "h2o says 1.0",
        "h2o says 0.0",
        "h2o says 0.5",
    ]


def test_a_baseline_is_that_of_its_own_run(tmp_path):
    full = [answered(f"a/{n}", "fullkv", None, 1.0) for n in range(3)]
    runs = [run_of(tmp_path / "one", full), run_of(tmp_path / "two", [answered("a/0", "h2o", 64, 0.0)])]
    assert [section.baseline for section in sections_of(labelled(runs))] == [("fullkv", "full"), None]


def test_a_folder_that_is_given_twice_is_there_once(tmp_path):
    run = run_of(tmp_path / "needle", [answered("a/1", "h2o", 64, 1.0)])
    again = Run(tmp_path / "other" / ".." / "needle", run.rows, run.settings, run.sessions)
    assert list(labelled([run, again])) == ["needle"]


# -- examples --------------------------------------------------------------------------------------------------------


def test_examples_have_what_each_configuration_answered_and_kept(tmp_path):
    rows = [
        answered("a/1", "fullkv", None, 1.0),
        answered("a/1", "h2o", None, 0.0, budget_share="10%"),
        answered("a/2", "h2o", None, float("nan"), budget_share="10%"),
    ]
    prompts = [prompt("a/1", ["The", " sea"], [" is", " wide"], tokens=90, question="Is it?", after="a/0")]
    kept = [{"example_id": "a/1", "method": "h2o", "budget": "10%", "kept": "0189"}]
    (item,) = examples_of(sections_of(labelled([run_of(tmp_path, rows, prompts, kept)])))
    assert item["configurations"] == [("fullkv", "full"), ("h2o", "10%")]
    first, second = item["examples"]
    assert (first["tokens"], first["question"], first["after"]) == (90, "Is it?", "a/0")
    assert [list(each) for each in item["texts"][first["text"]]] == [["The", " sea"], [" is", " wide"]]
    assert [row["kept"] for row in first["rows"]] == [None, "0189"]
    assert second["text"] is None, "this prompt was not recorded"
    assert second["rows"][0] is None, "and this configuration has no row of it"
    assert second["rows"][1]["scores"] == {"score": None}, "JSON has no NaN"


def test_a_text_that_examples_share_is_stored_once(tmp_path):
    names = [f"a/{n}" for n in range(5)]
    prompts = [prompt(names[0], ["same"] * 50, []), *(prompt(name, [], [], shared_with=names[0]) for name in names[1:])]
    run = run_of(tmp_path, [answered(name, "h2o", 64, 1.0) for name in names], prompts)
    (item,) = examples_of(sections_of(labelled([run])))
    assert len(item["texts"]) == 1 and {example["text"] for example in item["examples"]} == {0}


def test_packed_examples_come_out_as_they_were(tmp_path):
    nasty = "</script><script>alert(1)</script> \ud800 \u2028 \0"
    run = run_of(tmp_path, [answered("a/1", "h2o", 64, 1.0, prediction=nasty)])
    found = sections_of(labelled([run]))
    text = packed(found)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert unpacked(text) == json.loads(json.dumps(examples_of(found)))
    assert unpacked(text)[0]["examples"][0]["rows"][0]["prediction"] == nasty
    assert base64.b64decode(text)[4:8] == bytes(4), "no time in it: the same rows give the same page"


def test_rows_without_predictions_are_no_examples():
    assert packed(sections(make_row("a", "h2o", 64, 1.0))) == ""


# -- the page --------------------------------------------------------------------------------------------------------

EVIL = '"><script>window.pwned=1</script><b>&'


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """Whatever is written by a user, a data file or a model tries to become markup."""
    fields = {"benchmark": f"needle{EVIL}", "prediction": EVIL, "answers": [EVIL], "depth_percent": 0.0}
    rows = [
        answered(f"{EVIL.replace('/', '')}/{n}", method, budget, n / 2, context_length=512, **fields)
        for method, budget in (("fullkv", None), (f"h2o:{EVIL}", 64))
        for n in range(3)
    ]
    path = tmp_path_factory.mktemp("runs") / "<em>run"
    return render([run_of(path, rows, [prompt(rows[0]["example_id"], [EVIL], [])])])


def test_what_was_written_is_text_and_never_markup(page):
    parsed = Parsed(page)
    tags = {tag for tag, _ in parsed.elements}
    assert tags.isdisjoint({"em", "i", "object", "iframe"})
    assert [attributes.get("id") for attributes in parsed.of("script")] == ["examples-data", None]
    assert not [attributes for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert any(f"h2o:{EVIL}" == attributes.get("data-method") for attributes in parsed.of("tr"))
    assert any("<em>run" in text for text in parsed.inside("wbr") + parsed.inside("th"))
    assert any("<i>odd</i>" in text for text in parsed.inside("dd"))
    assert page.count("window.pwned") == page.count("&lt;script&gt;window.pwned")


def test_the_page_may_load_nothing_and_run_nothing_but_its_own_script(page):
    parsed = Parsed(page)
    (policy,) = [each["content"] for each in parsed.of("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    for text, rule in ((style, "style-src"), (script, "script-src")):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert "innerHTML" not in script and "eval(" not in script
    addresses = [
        attributes[name] for _, attributes in parsed.elements for name in ("src", "href") if name in attributes
    ]
    assert addresses and all(each.startswith(("#", "data:")) for each in addresses)
    assert not [attributes for _, attributes in parsed.elements if "style" in attributes], "the policy forbids them"


def test_figures_are_images_that_say_their_axes(page):
    images = Parsed(page).of("img")
    assert len(images) == 4, "by memory, by budget, and a heatmap of each configuration"
    for image in images:
        svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in svg[:1000]
        assert image["alt"].startswith("needle") and " by " in image["alt"]


def test_links_on_the_page_lead_somewhere(page):
    parsed = Parsed(page)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"].removeprefix("#") for link in parsed.of("a")} <= set(ids)


def test_every_column_is_explained(page):
    headings = [each for each in Parsed(page).of("th") if each.get("scope") == "col" and "title" in each]
    assert headings and all(each["title"] for each in headings)


def test_what_cannot_be_drawn_is_said_in_its_place_and_the_rest_is_drawn(tmp_path):
    bare = {"benchmark": "longbench", "group": "qa", "context_length": 8, "depth_percent": 0.0}
    budgets = [{"budget": 32}, {"budget": 64}, {"budget": 128}]
    rows = [
        {**bare, **budget, "method": "h2o", "example_id": f"qa/{n}", "score": 2.0 * n, "prediction": "", "answers": []}
        for budget in budgets
        for n in range(2)
    ]
    parsed = Parsed(render([Run(tmp_path, rows, {}, [])]))
    notes = parsed.inside("li")
    assert sum("ratio of its cache" in text for text in notes) == 1, "memory is not known"
    assert sum("heatmaps show 0..1" in text for text in notes) == 1, "of three configurations it is said once"
    assert any("nothing here keeps everything" in text for text in notes)
    assert ["by budget" in image["alt"] for image in parsed.of("img")] == [True]
    assert "not recorded" in parsed.inside("td"), "neither model nor device are known"


def test_a_run_without_rows_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: no rows yet, so there is nothing to report$"):
        render([Run(tmp_path, [], {}, [])])


def test_the_command_writes_the_page_of_a_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    row = answered("qa/1", "h2o", 64, 0.5, benchmark="ledger", prediction="\ud800")
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    output = tmp_path / "pages" / "report.html"
    report_command().main([str(folder), "--output", str(output)], standalone_mode=False)
    assert "<title>kvfactory: ledger</title>" in output.read_text(encoding="utf-8")
    with pytest.raises(click.BadParameter, match=r"give a file that ends in \.html"):
        report_command().main([str(folder), "--output", "report.pdf"], standalone_mode=False)
    with pytest.raises(UserError, match="no such folder"):
        report_command().main([str(tmp_path / "missing"), "--output", str(output)], standalone_mode=False)
