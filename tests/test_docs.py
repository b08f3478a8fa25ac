"""The documentation says what the code does: its plugins run, its lists are complete, its flags and links exist."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import click
import pytest
import torch
from entry_points import exit_code
from kvfactory_runners.commands import command as kvfactory_command
from transformers import AutoModelForCausalLM, GemmaConfig

from kvfactory import (
    AttentionScoredMethod,
    Engine,
    EvictionMethod,
    LayerContext,
    Store,
    TrackingMethod,
    WindowMethod,
    compress,
    hookspecs,
    load_method,
)
from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.benchmarks.latency import Latency, LatencySweep
from kvfactory.benchmarks.longbench import LongBench
from kvfactory.benchmarks.multiturn import Conversation, MultiTurn, Turn
from kvfactory.benchmarks.needle import STYLES, Needle
from kvfactory.benchmarks.perplexity import PROTOCOLS, Perplexity
from kvfactory.benchmarks.reading import Reading, read_passages
from kvfactory.benchmarks.ruler import GeneratedRuler, Sources
from kvfactory.jobs import make_jobs
from kvfactory.models import EMBEDDED_PACKAGE, load_tokenizer
from kvfactory.registry import Registry, get_registry
from kvfactory.report.methods import FIRST_LINE
from kvfactory.report.tables import summarise
from kvfactory.results import RunFolder, load_rows
from kvfactory.runner import GROWING, HARMLESS, Runner, benchmark_command
from kvfactory.sweep import Sweep
from kvfactory.testing import MethodContract, compress_layer, generate, reference_attention, tiny_model, tiny_prompts
from scripts import load_script

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "docs" / "example_plugin"
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
TEXTS = {name: path.read_text("utf-8") for name, path in PAGES.items()}
README, PLUGINS, RESULTS, BENCHMARKS = (
    TEXTS[name] for name in ("README.md", "docs/write_a_method.md", "docs/results.md", "docs/write_a_benchmark.md")
)

FILES = dict(re.findall(r"<!-- file: ([\w.]+)[^>]*-->\n```python\n(.*?)```", PLUGINS + BENCHMARKS, re.DOTALL))
BUILT_IN = sorted(name for name, entry in get_registry().methods.items() if entry.plugin.distribution == "kvfactory")
HOOKS = [name for name in vars(hookspecs) if name.startswith("kvfactory_")]
WITH_THE_EMBEDDED_MODEL = pytest.mark.skipif(
    not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])), reason="the embedded model is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of docs/write_a_method.md and docs/write_a_benchmark.md."""
    path = tmp_path_factory.mktemp("plugins")
    for name, code in FILES.items():
        (path / name).write_text(code, "utf-8")
    return path


@pytest.fixture(scope="module")
def documented(folder: Path) -> Registry:
    """A registry with all plugins of those pages in it."""
    registry = Registry.load()
    for name in FILES:
        if not name.startswith("test_"):
            registry.add_file(folder / name)
    return registry


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the demo leaves it, in results/demo below this one."""

    class OneExample(Benchmark):
        name = "one"

        def examples(self) -> list[Example]:
            return [Example("only/1", "only", ["yes"], max_new_tokens=2)]

        def prompt_ids(self, example: Example) -> list[int]:
            return list(range(3, 60))

        def score(self, example: Example, prediction: str) -> dict[str, float]:
            return {"score": 1.0}

    path = tmp_path_factory.mktemp("run")
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: "yes")
    jobs = make_jobs(get_registry(), ["fullkv", "snapkv"], [16])
    with RunFolder.open(path / "results" / "demo", {}, environment={}) as opened:
        Sweep(Engine(tiny_model()), tokenizer, OneExample(), jobs, opened, stop=()).run()
    return path


def table(text: str, heading: str) -> set[str]:
    """The names in the first column of the table whose first heading this is, without what is behind a bracket."""
    lines = text.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0].split("\n")[2:]
    return {name.split("(")[0] for line in lines for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


def public(cls: type) -> set[str]:
    inherited = {name for base in cls.__mro__ if base.__module__.startswith("kvfactory") for name in vars(base)}
    settings = {each.name for each in fields(cls)} if hasattr(cls, "__dataclass_fields__") else set()
    return {name for name in inherited | settings if not name.startswith("_")}


# ---- the plugins of the docs


def test_the_methods_of_the_docs_keep_what_they_say(documented: Registry) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 50, 8), torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    kept = {
        name: [each.tolist() for each in compress_layer(documented.load_method(name, 10), q, k, v).positions()]
        for name in set(documented.methods) - set(get_registry().methods)
    }
    shortest = [sorted(range(46), key=lambda token: float(head[token].norm()))[:6] for head in k]
    assert kept["newest"] == [list(range(40, 50))] * 2
    assert kept["keynorm"] == [[*sorted(head), 46, 47, 48, 49] for head in shortest]
    looked_at = reference_attention(q, k)[:, -1].unflatten(0, (2, 2)).mean(1)[:, :-1]
    assert kept["glance"] == [[*sorted(head.topk(9).indices.tolist()), 49] for head in looked_at]
    assert all(len(head) == 10 for head in kept["a2sf"])
    assert kept["thinning"] == [list(range(40, 50))] * 2
    assert set(kept) == {"newest", "keynorm", "glance", "a2sf", "thinning"}


def test_the_store_of_the_docs_thins_out_its_middle(documented: Registry) -> None:
    k = torch.randn(2, 60, 8)
    store = compress_layer(documented.load_method("thinning", 10), *(k[:, :50],) * 3)
    seen = []
    for at in range(50, 60):
        store.append(k[:, at : at + 1], k[:, at : at + 1], at)
        store.observe(None)
        seen.append(store.positions()[0].tolist())
    assert seen[0] == [40, 42, 44, *range(45, 51)], "eleven: of the five oldest three stay"
    assert seen[-1][0] == 40 and seen[-1][-5:] == [55, 56, 57, 58, 59] and max(map(len, seen)) == 10


def test_the_merge_of_the_docs_takes_leave(documented: Registry) -> None:
    k, v = torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    method = documented.load_method("newest", 10, merge="farewell", farewell_share=0.25)
    store = compress_layer(method, k, k, v)
    for head in range(2):
        expected = 0.75 * v[head, 40:] + 0.25 * v[head, :40].mean(0)
        torch.testing.assert_close(store.values()[head], expected)
        assert torch.equal(store.keys()[head], k[head, 40:])


@pytest.mark.parametrize("expected", [[15, 5, 15, 5], [15, 5, 10]])
def test_the_allocator_of_the_docs_keeps_the_budget(documented: Registry, expected: list[int]) -> None:
    method = documented.load_method("newest", 10, allocator="alternating")
    q, k, v = torch.randn(2, 50, 8), torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    layers = range(len(expected))
    assert [compress_layer(method, q, k, v, each, len(layers)).lengths() for each in layers] == [
        [length] * 2 for length in expected
    ]


@WITH_THE_EMBEDDED_MODEL
def test_the_benchmark_of_the_docs_runs(
    documented: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvfactory_runners.commands.registry_for", lambda arguments: documented)
    sweep = ["--method", "fullkv,snapkv", "--max_capacity_prompts", "32", "--device", "cpu"]
    ledger = ["run", "ledger", "--entries", "8", *sweep, "--save_dir", str(tmp_path)]
    assert exit_code("kvfactory", [*ledger, "--samples", "2"]) == 0
    assert "ledger: 8 entries" in capsys.readouterr().out
    rows = load_rows(tmp_path)
    assert [row["method"] for row in rows if row["example_id"] == "8/0"] == ["fullkv", "snapkv"]
    assert {(row["group"], row["ability"], *row["scores"]) for row in rows} == {("8 entries", 0.5, "score")}
    assert exit_code("kvfactory", [*ledger, "--samples", "3"]) == 0, "samples may grow"
    assert load_rows(tmp_path)[:4] == rows and len(load_rows(tmp_path)) == 6


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_family_of_the_docs_is_the_stock_model(
    documented: Registry, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setitem(get_registry().families, "gemma", documented.families["gemma"])
    sizes = {"vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    config = GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, hidden_activation="gelu_pytorch_tanh")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
    ids, mask = tiny_prompts(60)
    with torch.no_grad():
        stock, tokens = model(ids).logits, generate(model, ids, mask)
        with compress(model, load_method("fullkv")):
            assert torch.equal(model(ids).logits, stock)
            assert torch.equal(generate(model, ids, mask), tokens)


def test_the_contract_test_of_the_docs_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    contract = importlib.import_module("test_newest").TestNewest()
    for rule in rules():
        getattr(contract, rule)()


def test_the_example_is_the_one_of_the_docs() -> None:
    assert FILES["kvf_a2sf.py"] == (EXAMPLE / "kvf_a2sf.py").read_text("utf-8")


def test_the_smallest_method_is_ten_lines_of_code() -> None:
    lines = [line for line in FILES["newest.py"].splitlines() if line and not line.startswith(('"""', "#"))]
    assert len(lines) <= 10


# ---- lists


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_its_arguments(name: str) -> None:
    hook = getattr(hookspecs, name)
    heading = f"\n### {name}({', '.join(inspect.signature(hook).parameters)})\n"
    assert heading in PLUGINS
    call = inspect.signature(get_type_hints(hook)["register"].__call__)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in list(call.parameters.values())[1:]]
    assert f"\n    register{inspect.Signature(bare)}\n" in PLUGINS.split(heading)[1].split("\n### ")[0]


def test_no_hook_is_documented_that_does_not_exist() -> None:
    assert re.findall(r"^### (kvfactory_\w+)", PLUGINS, re.MULTILINE) == HOOKS


@pytest.mark.parametrize("cls", [LayerContext, EvictionMethod, Store])
def test_every_name_of_a_class_is_in_its_reference(cls: type) -> None:
    assert table(PLUGINS, f"`{cls.__name__}`") == public(cls)


@pytest.mark.parametrize(
    ("cls", "base"), [(AttentionScoredMethod, EvictionMethod), (TrackingMethod, AttentionScoredMethod)]
)
def test_what_a_kind_of_method_adds_is_in_the_reference(cls: type, base: type) -> None:
    assert table(PLUGINS, f"`{cls.__name__}` has besides") == public(cls) - public(base)


def test_what_a_window_adds_is_in_the_reference() -> None:
    added = public(WindowMethod) - public(EvictionMethod)
    assert table(PLUGINS, "`WindowMethod` has besides what an `EvictionMethod` has") == added


@pytest.mark.parametrize("cls", [Example, Runner])
def test_every_field_of_a_benchmark_is_in_its_reference(cls: type) -> None:
    assert table(BENCHMARKS, f"`{cls.__name__}`") == {each.name for each in fields(cls)}


def test_every_member_of_a_benchmark_is_in_its_reference() -> None:
    members = {name for name in (*vars(Benchmark), *Benchmark.__annotations__) if not name.startswith("_")}
    assert table(BENCHMARKS, "`Benchmark`") == members


def rules() -> list[str]:
    return [name for name in vars(MethodContract) if name.startswith("test_")]


def test_every_rule_of_the_contract_is_listed() -> None:
    section = PLUGINS.split("\n## The contract kit\n")[1]
    listed = re.findall(r"^- (.+)$", section, re.MULTILINE)
    assert listed == [rule.removeprefix("test_").replace("_", " ") for rule in rules()]
    assert table(section, "attribute") == set(MethodContract.__annotations__)


def test_every_field_of_a_row_is_explained(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "results" / "demo" / "rows.jsonl").read_text().splitlines()]
    assert table(RESULTS, "field") == set(rows[0])
    assert table(RESULTS, "column") == set(summarise(rows).columns)


@WITH_THE_EMBEDDED_MODEL
def test_every_field_that_needles_add_is_explained() -> None:
    tokenizer, haystack = load_tokenizer(), load_haystack()
    added: set[str] = set()
    for style, needles in [*((style, None) for style in STYLES), ("number", 2)]:
        grid = {"lengths": [800], "depths": [50], "samples": 1}
        needle = Needle(tokenizer, style=style, needles=needles, haystack=haystack, **grid)
        example = needle.examples()[0]
        added |= {*example.info, *needle.score(example, "")}
    assert table(RESULTS, "needle") == added - {"score"}


def test_every_field_that_longbench_adds_is_explained(tmp_path: Path) -> None:
    row = {"input": "", "context": "It rained.", "answers": ["Rain."], "length": 2, "language": "en"}
    for dataset in ("gov_report", "qasper"):
        (tmp_path / f"{dataset}.jsonl").write_text(json.dumps({**row, "all_classes": None}))
    bench = LongBench(None, ["gov_report", "qasper"], data_dir=tmp_path, max_prompt_tokens=100, chat=False)
    added = {name for each in bench.examples() for name in (*each.info, *bench.score(each, "Rain."))}
    assert table(RESULTS, "LongBench") == added - {"score"}


def added_by(benchmark: Benchmark) -> set[str]:
    """The fields that the rows of a benchmark's first example have beside everybody's."""
    first = benchmark.examples()[0]
    measured = benchmark.measure(first, [1.0] * 9) if first.answers == [] else benchmark.score(first, "yes")
    ability = set() if first.ability is None else {"ability"}
    return ({*first.info, *measured} | ability) - {"score"}


@WITH_THE_EMBEDDED_MODEL
def test_every_field_that_tasks_with_questions_add_is_explained() -> None:
    tokenizer = load_tokenizer()
    reading = Reading(tokenizer, read_passages(), kinds=["fill the blank"])
    assert table(RESULTS, "reading") | {"ability"} == added_by(reading)
    ruler = GeneratedRuler(tokenizer, tasks=["vt"], lengths=[1024], samples=1, sources=Sources())
    assert table(RESULTS, "RULER") == added_by(ruler)
    talk = Conversation("It rained.", [Turn("Did it rain?", ["yes"])])
    assert table(RESULTS, "multiturn") == added_by(MultiTurn(tokenizer, [talk], history="own"))


def test_every_field_that_perplexity_adds_is_explained() -> None:
    protocols = [protocol() for protocol in PROTOCOLS.values()]
    of_protocols = {name for protocol in protocols for name in protocol.record()} | {"stride"}
    fields = {
        name for each in protocols for name in added_by(Perplexity(each, {"a": [1] * 4096}, {"dtype": "float32"}))
    }
    explained = table(RESULTS, "perplexity")
    assert explained == fields - of_protocols
    listed = RESULTS.split("| `protocol` |")[1].split("\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == of_protocols


def test_every_field_that_latency_adds_is_explained(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), SimpleNamespace()
    benchmark = Latency(vocabulary=range(9), lengths=[20], new_tokens=2, warmup=0, repeats=1, memory_bytes=2**30)
    with RunFolder.open(tmp_path, {}, environment={}) as folder:
        sweep = LatencySweep(
            Engine(model), tokenizer, benchmark, make_jobs(get_registry(), ["fullkv"], [16]), folder, ()
        )
        sweep.run()
        [row] = sweep.rows()
    on_a_gpu = {"peak_bytes", "peak_reserved_bytes", "allocated_before_bytes"}
    assert table(RESULTS, "latency") == (set(row) | on_a_gpu | {"peak_rss_bytes"}) - table(RESULTS, "field")


def test_every_room_is_in_the_architecture() -> None:
    rooms = {
        f"{path.name}{'/' * path.is_dir()}" for path in (ROOT / "kvfactory").glob("[!_]*") if path.name != "py.typed"
    }
    named = {name.removeprefix("kvfactory/") for name in table(TEXTS["docs/architecture.md"], "room")}
    assert named == rooms | {"plugins/", "runners/"}


def test_what_may_change_on_resume_is_listed() -> None:
    section = RESULTS.split("\n## Resuming\n")[1]
    for flags in (GROWING, HARMLESS):
        assert f" {', '.join(f'`--{flag}`' for flag in flags)}." in section.replace("\n", " ")
    runners: dict[str, Runner] = get_registry().benchmarks
    grows = {name: ", ".join(f"`--{flag}`" for flag in runner.grows) for name, runner in runners.items()}
    assert dict(re.findall(r"^\| `(\w+)` \| (`--.+) \|$", section, re.MULTILINE)) == {
        k: v for k, v in grows.items() if v
    }


def test_the_page_of_commands_is_what_help_says() -> None:
    assert TEXTS["docs/commands.md"] == load_script("commands_page").page(), "run `python scripts/commands_page.py`"


def test_the_tables_of_methods_are_those_that_the_script_writes() -> None:
    """All but the measured columns, which are taken as they stand."""
    tables, registry, page = load_script("methods_table"), get_registry(), TEXTS["docs/methods.md"]
    stale = "run `python scripts/methods_table.py --no-measure`"
    assert tables.between(README, "methods") == tables.readme_table(registry), stale
    assert tables.between(page, "settings") == tables.settings_table(registry), stale
    numbers = tables.read_numbers(page)
    assert tables.between(page, "table") == tables.table(registry, numbers), stale
    assert {*BUILT_IN, *map(str.lower, tables.VARIANTS)} == set(numbers)
    assert all(re.fullmatch(r"[\d.]+%?", each) for line in numbers.values() for each in line), (
        "nothing is left unmeasured"
    )


def test_performance_says_what_each_way_to_store_and_read_costs() -> None:
    measured = " ".join(re.findall(r"^\| `(.*?)` \|", TEXTS["docs/performance.md"], re.MULTILINE))
    ways = [name for kind in ("quant_method", "key_pruning", "retrieval") for name in get_registry().parts[kind]]
    assert set(ways) <= set(re.split(r"[ :=]", measured))


def test_the_readme_lists_every_part() -> None:
    flags = dict(re.findall(r"^\| `--(\w+)` \| (.+) \|$", README, re.MULTILINE))
    for kind, shelf in get_registry().parts.items():
        assert set(shelf) <= set(re.findall(r"`([\w-]+)`", flags[kind])), kind


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_first_line_of_a_plugin_says_what_it_does(name: str) -> None:
    module = inspect.getmodule(get_registry().methods[name].attention)
    assert FIRST_LINE.fullmatch((module.__doc__ or "").split("\n")[0])


# ---- commands, links and code


def runners() -> dict[str, Any]:
    scripts = metadata.distribution("kvfactory").entry_points.select(group="console_scripts")
    return {each.name: importlib.import_module(each.module) for each in scripts if each.name.startswith("run_")}


def test_every_flag_in_the_docs_exists(documented: Registry) -> None:
    helps = [benchmark_command(name, documented) for name in documented.benchmarks]
    assert len(helps) >= len(runners())
    own = kvfactory_command([])
    assert isinstance(own, click.Group)
    commands = [*helps, *documented.commands.values(), *own.commands.values()]
    text = " ".join(command.get_help(click.Context(command)) for command in commands)
    text += " ".join(
        script.read_text("utf-8") for folder in ("scripts", "benchmarks") for script in (ROOT / folder).glob("*.py")
    )
    flag = r"(?<![\w-])--[a-z][a-z_]*(?![\w-])"  # pip's have hyphens
    for page, words in TEXTS.items():
        assert set(re.findall(flag, words)) <= set(re.findall(flag, text)), page


def test_every_command_in_the_docs_exists() -> None:
    for page, words in TEXTS.items():
        assert set(re.findall(r"\brun_\w+\.py\b", words)) <= set(runners()), page
        assert all((ROOT / script).is_file() for script in re.findall(r"\bscripts/\w+\.sh\b", words)), page


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https://)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        there = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, target


def test_all_python_in_the_docs_is_run_by_a_test() -> None:
    for page, text in TEXTS.items():
        assert text.count("```python\n") == len(re.findall(r"<!-- (?:runs|file: .+?) -->\n```python\n", text)), page


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- runs -->" in TEXTS[page]])
def test_the_python_in_the_docs_runs(page: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "README.md" and not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])):
        pytest.skip("the embedded model is not installed")
    monkeypatch.chdir(run)
    namespace: dict[str, Any] = {}
    for code in re.findall(r"<!-- runs -->\n```python\n(.*?)```", TEXTS[page], re.DOTALL):
        exec(compile(code, page, "exec"), namespace)
