"""Perplexity: what protocols score, against golden values, one forward pass and slow, obvious versions of it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_points import exit_code
from hypothesis import given
from hypothesis import strategies as st
from kvfactory_runners import run_perplexity
from kvfactory_runners.run_perplexity import check_windows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, models
from kvfactory.benchmarks import long_texts
from kvfactory.benchmarks.long_texts import first_ids
from kvfactory.benchmarks.one_pass import AttendToKept, attending
from kvfactory.benchmarks.perplexity import (
    PROTOCOLS,
    Disjoint,
    LeakySinglePass,
    Perplexity,
    PerplexitySweep,
    PrefillThenContinue,
    Protocol,
    Strided,
    TokenByToken,
    choose_protocol,
)
from kvfactory.benchmarks.texts import MODULES, load_texts
from kvfactory.errors import UserError
from kvfactory.jobs import Job
from kvfactory.registry import get_registry
from kvfactory.report.tables import summarise
from kvfactory.results import RunFolder, load_rows
from kvfactory.testing import TINY_CONFIGS, compress_layer, tiny_model

FEW_BITS = "kivi:nbits=2:quant_residual_length=16"


class Spied(Perplexity):
    """Rows with every loss in them."""

    def measure(self, example: Any, losses: Sequence[float]) -> dict[str, Any]:
        return {**super().measure(example, losses), "losses": list(losses)}


def ids(seed: int, count: int) -> list[int]:
    return torch.randint(8, 190, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def jobs_of(protocol: Protocol, *specs: str, budget: int = 16, **settings: str) -> list[Job]:
    registry = get_registry()
    flags = {
        "protocol": protocol.name,
        **{name: getattr(protocol, name, None) for name in run_perplexity.SETTINGS},
        "method": specs,
        "max_capacity_prompts": [budget],
        **dict.fromkeys(registry.parts),
    }
    return run_perplexity.jobs(registry, flags, settings)


def run(
    protocol: Protocol, text: list[int], *specs: str, path: Path, model: Any = None, budget: int = 16, **settings: str
) -> list[dict[str, Any]]:
    benchmark = Spied(protocol, {"text": text}, {})
    jobs = jobs_of(protocol, *specs, budget=budget, **settings)
    with RunFolder.open(path, {}, environment={}) as folder:
        tokenizer: Any = None
        sweep = PerplexitySweep(Engine(model or tiny_model()), tokenizer, benchmark, jobs, folder, ())
        sweep.run()
        return sweep.rows()


def stock_losses(text: list[int]) -> list[float]:
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([text])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none").tolist()


# ---- windows ----


@given(tokens=st.integers(2, 300), seqlen=st.integers(2, 90), data=st.data())
def test_strided_windows_score_what_none_before_has_seen(tokens: int, seqlen: int, data: st.DataObject) -> None:
    """Against the rule token by token: a window scores a token if it is not its first and no window before reached it."""
    stride = data.draw(st.integers(1, seqlen))
    expected, reached = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + seqlen, tokens)
        expected += [(begin, end, position) for position in range(begin + 1, end) if position >= reached]
        reached = end
        if end == tokens:
            break
    windows = Strided(seqlen=seqlen, stride=stride).cut(tokens)
    found = [(each.begin, each.end, at) for each in windows for at in range(each.end - each.scored, each.end)]
    assert found == expected and all(each.scored for each in windows)
    if stride < seqlen:
        assert [position for _, _, position in found] == list(range(1, tokens)), "every token but the first, once"


def golden_protocol(case: dict[str, Any]) -> Protocol:
    kinds: dict[str, Callable[[], Protocol]] = {
        "strided": lambda: Strided(seqlen=case["max_length"], stride=case["stride"]),
        "disjoint": lambda: Disjoint(seqlen=case["seqlen"]),
        "token_by_token_full_cache": lambda: TokenByToken(tokens=case["tokens"]),
        "one_forward": lambda: Disjoint(seqlen=case["tokens"]),
    }
    return kinds[case["kind"]]()


def test_golden_counts_of_windows_and_scored_tokens(shared: Path) -> None:
    for case in json.loads((shared / "golden" / "perplexity_smollm2_135m.json").read_text())["cases"]:
        windows = golden_protocol(case).cut(case["tokens"])
        assert case.get("chunks", len(windows)) == len(windows)
        assert case.get("scored_tokens", 0) in (0, sum(window.scored for window in windows))


def test_windows_of_a_fixed_stride_and_the_rest_dropped() -> None:
    assert [(each.begin, each.end, each.scored) for each in Disjoint(seqlen=40).cut(119)] == [(0, 40, 39), (40, 80, 39)]
    pairs = PrefillThenContinue(prefix=30, continuation=10)
    assert [(each.begin, each.end, each.scored) for each in pairs.cut(119)] == [(0, 40, 10), (40, 80, 10)]
    often = PrefillThenContinue(prefix=30, continuation=10, stride=10, windows=3)
    assert [each.begin for each in often.cut(119)] == [0, 10, 20]
    assert [(each.begin, each.end, each.scored) for each in TokenByToken(tokens=50).cut(20)] == [(0, 20, 19)]


# ---- figures ----


def test_golden_perplexity_of_wikitext(shared: Path, embedded: Any, tmp_path: Path) -> None:
    """The first half of one window's losses is what a window of half the length costs."""
    golden = json.loads((shared / "golden" / "perplexity_smollm2_135m.json").read_text())
    rows = (shared / "data" / "wikitext2" / "test_rows.jsonl").read_text().splitlines()[:40]
    text = models.load_tokenizer().encode("\n\n".join(json.loads(row)["text"] for row in rows), verbose=False)[:1000]
    assert text[:16] == golden["first_ids"] and len(text) == 1000
    [case] = [case for case in golden["cases"] if case["tokens"] == 1000]
    [forward] = [case for case in golden["cases"] if case["kind"] == "one_forward"]
    [row] = run(golden_protocol(case), text, "fullkv", path=tmp_path, model=embedded)
    assert row["perplexity"] == pytest.approx(case["ppl"], rel=1e-5)
    assert row["nll"] * row["scored_tokens"] == pytest.approx(case["nll_sum"], rel=1e-5)
    half = Perplexity(golden_protocol(forward), {"text": text}, {})
    measured = half.measure(half.examples()[0], row["losses"][: forward["tokens"] - 1])
    assert measured["perplexity"] == pytest.approx(forward["ppl"], rel=1e-5)
    assert measured["scored_tokens"] == forward["scored_tokens"]


@pytest.mark.parametrize("protocol", [Disjoint(seqlen=120), Strided(seqlen=200, stride=200), TokenByToken(tokens=120)])
def test_a_full_cache_costs_what_one_forward_costs(protocol: Protocol, tmp_path: Path) -> None:
    text = ids(1, 120)
    [row] = run(protocol, text, "fullkv", path=tmp_path)
    assert row["losses"] == pytest.approx(stock_losses(text), abs=1e-4)
    assert row["scored_tokens"] == 119 and row["perplexity"] == pytest.approx(math.exp(sum(row["losses"]) / 119))
    assert row["benchmark"] == f"perplexity, {protocol.name}" and row["protocol"] == protocol.name
    assert row["new_tokens"] == 0 and "prediction" not in row


def test_strided_is_the_sum_over_windows_by_the_number_of_scored_tokens(tmp_path: Path) -> None:
    text, total, scored, before = ids(2, 150), 0.0, 0, 0
    for begin in range(0, 150, 30):
        end = min(begin + 64, 150)
        losses = stock_losses(text[begin:end])[-(end - before) :]
        total, scored, before = total + sum(losses), scored + len(losses), end
        if end == 150:
            break
    line = summarise(run(Strided(seqlen=64, stride=30), text, "fullkv", path=tmp_path)).iloc[0]
    assert line["scored_tokens"] == scored == 149
    assert line["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-5)


def test_prefill_then_continue_is_a_prefill_and_a_score(tmp_path: Path) -> None:
    text, specs = ids(3, 200), ["fullkv", "snapkv:window_size=4", "h2o:decode_budget=same:recent_size=4"]
    rows = run(PrefillThenContinue(prefix=60, continuation=20, stride=70), text, *specs, path=tmp_path)
    assert len(rows) == 2 * 3
    engine, jobs = Engine(tiny_model()), {job.label: job for job in jobs_of(PrefillThenContinue(), *specs)}
    for row in rows:
        begin = row["begin"]
        [prompt] = engine.prefill(text[begin : begin + 60], [jobs[row["method"]].method])
        [expected] = engine.score([prompt], text[begin + 60 : begin + 80])
        assert row["losses"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert (row["prefix"], row["continuation"], row["stride"], row["end"]) == (60, 20, 70, begin + 80)
        assert row["evicted"] == (row["method"] != "fullkv") and row["prompt_tokens"] == 60


# ---- token by token ----


def test_eviction_keeps_to_the_budget_at_every_step_and_methods_step_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, specs = ids(4, 90), ["fullkv", "h2o:recent_size=4", "snapkv:window_size=4", "slidingwindow"]
    together, most, plain = set(), dict.fromkeys(specs, 0.0), Engine.step

    def watched(engine: Engine, rows: Sequence[Any]) -> Any:
        going = plain(engine, rows)
        together.add(len(rows))
        for row in rows:
            most[row.job.label] = max(most[row.job.label], *row.sequence.cache.kept())
        return going

    monkeypatch.setattr(Engine, "step", watched)
    rows = {row["method"]: row for row in run(TokenByToken(tokens=90), text, *specs, path=tmp_path)}
    monkeypatch.undo()
    assert together == {4} and most == {"fullkv": 89} | dict.fromkeys(specs[1:], 16)
    engine = Engine(tiny_model())
    for job in jobs_of(TokenByToken(), *specs):
        [sequence], losses = engine.prefill(text[:1], [job.method]), []
        for token in text[1:]:
            assert sequence.logits is not None
            losses.append(-sequence.logits.log_softmax(-1)[token].item())
            engine.extend(sequence, [token])
        row = rows[job.label]
        assert row["losses"] == pytest.approx(losses, abs=1e-4)
        full = job.label == "fullkv"
        assert row["evicted"] != full and row["kept_tokens_max"] == (89 if full else 16), "at the end, not at the start"
        assert row["settings"].get("decode_budget") == (None if full else "same")
        assert row["prompt_tokens"] == 1 and (row["ratio"] < 1) != full
    assert len({row["nll"] for row in rows.values()}) == 4


def test_what_the_user_says_of_the_decode_budget_goes_before_what_is_presumed() -> None:
    def budgets(*specs: str, **settings: str) -> list[Any]:
        return [job.method.settings().get("decode_budget") for job in jobs_of(TokenByToken(), *specs, **settings)]

    short = "snapkv:window_size=4"
    assert budgets(short, "fullkv") == ["same", None]
    assert budgets(short, decode_budget="12") == [12]
    assert budgets(short, f"{short}:decode_budget=none", "slidingwindow:decode_budget=20") == ["same", None, 20]
    assert budgets("fullkv", "quest") == [None, None]
    assert [job.method.settings()["decode_budget"] for job in jobs_of(PrefillThenContinue(), short)] == [None]


# ---- one pass ----

Kept = Callable[[Tensor, Tensor, Tensor], tuple[list[Tensor], list[Tensor], list[Tensor]]]
"""Queries, keys and values [heads, tokens, dim] of a layer -> keys, values and places of what is kept, one a KV head."""


def losses_slowly(text: list[int], kept: Kept) -> list[float]:
    """A Llama written out: each query attends, by itself, to those kept entries whose place is not behind its own."""
    model = tiny_model()
    states = model.model.embed_tokens(torch.tensor(text))
    cos, sin = model.model.rotary_emb(states[None], torch.arange(len(text))[None])

    def rotated(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos[0] + torch.cat([-right, left], -1) * sin[0]

    for layer in model.model.layers:
        block, hidden = layer.self_attn, layer.input_layernorm(states)
        q, k, v = (
            project(hidden).view(len(text), -1, block.head_dim).transpose(0, 1)
            for project in (block.q_proj, block.k_proj, block.v_proj)
        )
        q, k = rotated(q), rotated(k)
        keys, values, places = kept(q, k, v)
        attended = torch.empty_like(q)
        for head in range(len(q)):
            of = head * len(keys) // len(q)
            for at in range(len(text)):
                seen = places[of] <= at
                weights = (keys[of][seen] @ q[head, at] / math.sqrt(block.head_dim)).softmax(0)
                attended[head, at] = weights @ values[of][seen]
        states = states + block.o_proj(attended.transpose(0, 1).flatten(1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    logits = model.lm_head(model.model.norm(states))[:-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none").tolist()


def all_places(keys: list[Tensor]) -> list[Tensor]:
    return [torch.arange(len(each)) for each in keys]


@torch.no_grad()
def test_the_slow_version_is_the_stock_model_if_everything_is_kept() -> None:
    text = ids(5, 40)
    slow = losses_slowly(text, lambda q, k, v: (list(k), list(v), all_places(list(k))))
    assert slow == pytest.approx(stock_losses(text), abs=1e-4)


@torch.no_grad()
def test_in_one_pass_tokens_attend_to_what_few_bits_make_of_those_before(tmp_path: Path) -> None:
    text = ids(6, 64)
    rows = {row["method"]: row for row in run(Disjoint(seqlen=64), text, "fullkv", FEW_BITS, path=tmp_path)}
    [quantised] = jobs_of(Disjoint(), FEW_BITS)

    def kept(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        store = compress_layer(quantised.method.method, q, k, v)
        return store.keys(), store.values(), store.positions()

    few = rows[FEW_BITS]
    assert few["losses"] == pytest.approx(losses_slowly(text, kept), abs=1e-4)
    assert few["losses"] != pytest.approx(stock_losses(text), abs=1e-2)
    assert few["ratio"] < 1 and not few["evicted"] and few["settings"]["nbits"] == 2
    [plain] = Engine(tiny_model()).prefill(text, [jobs_of(PrefillThenContinue(), "fullkv")[0].method], losses=True)
    assert rows["fullkv"]["losses"] == plain.losses, "bit for bit"


@torch.no_grad()
@pytest.mark.parametrize("budget", [12, 48])
def test_the_leaky_pass_masks_the_kept_tokens_by_their_index(budget: int, tmp_path: Path) -> None:
    """Query i sees the i-th of the last tokens, which comes later; with room for all it is an ordinary pass."""
    text = ids(7, 48)
    rows = run(LeakySinglePass(seqlen=48), text, "slidingwindow", path=tmp_path, budget=budget)

    def kept(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        keys, values = list(k[:, -budget:]), list(v[:, -budget:])
        return keys, values, all_places(keys)

    assert rows[0]["losses"] == pytest.approx(losses_slowly(text, kept), abs=1e-4)
    assert (rows[0]["losses"] == pytest.approx(stock_losses(text), abs=1e-4)) == (budget == 48)
    assert rows[0]["kept_tokens_mean"] == budget and rows[0]["evicted"] == (budget < 48)


def test_only_the_leaky_pass_leaks(tmp_path: Path) -> None:
    text = ids(8, 40)
    changed = [*text[:-1], text[-1] + 1]

    def first(protocol: Protocol, spec: str) -> list[list[float]]:
        return [
            run(protocol, each, spec, path=tmp_path / f"{protocol.name}{number}", budget=8)[0]["losses"][0]
            for number, each in enumerate((text, changed))
        ]

    leaky = first(LeakySinglePass(seqlen=40), "slidingwindow")
    assert leaky[0] != leaky[1]
    disjoint = first(Disjoint(seqlen=40), "kivi:nbits=2:quant_residual_length=8:axis_key=1")
    assert disjoint[0] == disjoint[1]


@dataclass(frozen=True, kw_only=True)
class EveryThird(Method):
    """Evicts without a budget."""

    first: int = 0

    def compress(self, layer: LayerContext) -> Store:
        index = torch.arange(self.first, layer.num_tokens, 3)
        return DenseStore(layer.keys[:, index], layer.values[:, index], index[None].int())


@torch.no_grad()
def test_by_position_a_query_sees_what_is_kept_up_to_it(tmp_path: Path) -> None:
    text, engine = ids(9, 40), Engine(tiny_model())

    def kept(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return list(k[:, ::3]), list(v[:, ::3]), [torch.arange(0, 40, 3)] * len(k)

    [sequence] = engine.prefill(text, [attending(EveryThird(), "position")], losses=True)
    assert sequence.losses == pytest.approx(losses_slowly(text, kept), abs=1e-4)
    with pytest.raises(UserError, match="EveryThird leaves a head of layer 0 nothing that the first token may see"):
        engine.prefill(text, [attending(EveryThird(first=1), "position")])


def test_a_layer_is_compressed_as_the_model_has_it() -> None:
    """Budgets by layer and rotary angles are known inside of attention too."""
    specs = ["pyramidkv:window_size=4", "semantic", "streamingllm:cache_positions=true"]
    engine, text = Engine(tiny_model()), ids(10, 80)
    for job in jobs_of(LeakySinglePass(), *specs, budget=24):
        assert isinstance(job.method, AttendToKept)
        [alone] = engine.prefill(text, [job.method.method])
        [wrapped] = engine.prefill(text, [job.method])
        assert wrapped.cache.kept()[0] == alone.cache.kept()[0], "the first layer sees the same either way"
        assert wrapped.cache.method.settings() == job.method.settings()
        assert not torch.equal(wrapped.logits, alone.logits)


# ---- bad input, texts and the command ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = models.load_tokenizer()
    config = TINY_CONFIGS["llama"].to_dict() | {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "tale.txt"
    file.write_bytes("\ufeffOnce upon a time 🦉\r\n\r\n从前有一座山。 ".encode() * 40)
    return file


def command(tiny: Path, save_dir: Path, *more: object) -> int:
    flags = ["--model_path", tiny, "--save_dir", save_dir, "--dtype", "float32", "--device", "cpu"]
    budget = [] if "--max_capacity_prompts" in more else ["--max_capacity_prompts", 40]
    return exit_code("run_perplexity.py", [str(each) for each in (*flags, *budget, *more)])


def refused(code: int, capsys: Any) -> str:
    """The one line on stderr of a command that was refused."""
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


BAD = [
    (["--protocol", "stride"], ["--protocol", "strided"]),
    (["--protocol", "disjoint", "--stride", 8], ["--stride 8", "disjoint takes --seqlen"]),
    (["--seqlen", 64], ["--seqlen 64", "prefill_then_continue takes --prefix, --continuation, --stride, --windows"]),
    (["--protocol", "strided", "--seqlen", 64], ["--stride 512", "--seqlen 64"]),
    (["--protocol", "disjoint", "--seqlen", 1], ["--seqlen 1", "2 tokens or more"]),
    (["--protocol", "disjoint", "--seqlen", 1025], ["--seqlen 1025", "window is 1024"]),
    (["--prefix", 1020], ["--prefix 1020 --continuation 256: 1276 tokens", "window is 1024"]),
    (
        ["--protocol", "disjoint", "--seqlen", 64, "--method", "fullkv,h2o,snapkv"],
        ["--method h2o, snapkv", "token_by_token"],
    ),
    (
        ["--protocol", "strided", "--seqlen", 64, "--stride", 8, "--method", "quest"],
        ["--method quest", "prefill_then_con"],
    ),
    (["--protocol", "leaky_single_pass", "--seqlen", 64, "--method", "snapkv,kvzip,minicache"], ["kvzip, minicache: "]),
    (["--protocol", "token_by_token", "--method", "pyramidkv,h2o,think"], ["pyramidkv, think", "--allocator uniform"]),
    (["--protocol", "token_by_token", "--method", "kvzip"], ["--decode_budget same", "prefill_then_continue"]),
    (
        ["--protocol", "token_by_token", "--method", "h2o", "--max_capacity_prompts", "10%"],
        ["10%", "number of entries"],
    ),
    (["--method", "h2o:decode_budget=few"], ["--decode_budget is 'few'"]),
    (["--texts", "prose"], ["unknown text 'prose'", "narrative"]),
    (["--texts", "code", "--text", "x.txt"], ["--text and --texts"]),
    (["--text", "no/such.txt"], ["--text no/such.txt", "No such file"]),
    (["--texts", "qa", "--max_tokens", 100], ["the text qa has 100 tokens", "--prefix 64 --continuation 256"]),
    (["--protocol", "token_by_token", "--texts", "qa", "--max_tokens", 1], ["the text qa has 1 tokens"]),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=lambda value: " ".join(map(str, value)))
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[Any], words: list[str], tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    usual = ["--method", "fullkv"] if "--method" not in flags else []
    prefix = ["--prefix", 64] if {"--texts", "--text"} & set(flags) and "--protocol" not in flags else []
    said = refused(command(tiny, tmp_path / "run", *usual, *prefix, *flags), capsys)
    assert all(word in said for word in words), said
    assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_texts_that_hold_nothing_are_named(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--method", "fullkv", "--prefix", 64, "--text", tmp_path / "text.txt"]
    for content, word in ((b"", "no text in it"), (b" \r\n", "no text in it"), (b"\xff\xfea", "not UTF-8")):
        (tmp_path / "text.txt").write_bytes(content)
        said = refused(command(tiny, tmp_path / "run", *flags), capsys)
        assert f"--text {tmp_path / 'text.txt'}" in said and word in said


def test_beyond_the_models_window_only_token_by_token_goes(capsys: Any) -> None:
    check_windows(TokenByToken(tokens=600), tiny_model())
    assert "notice: --tokens 600" in capsys.readouterr().err
    check_windows(TokenByToken(tokens=500), tiny_model())
    check_windows(Disjoint(seqlen=512), tiny_model())
    check_windows(PrefillThenContinue(prefix=100, continuation=100), tiny_model("mistral-window"))
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--seqlen 513: 513 tokens"):
        check_windows(Strided(seqlen=513), tiny_model())
    with pytest.raises(UserError, match="sliding window, 24 tokens"):
        check_windows(LeakySinglePass(seqlen=25), tiny_model("mistral-window"))
    assert capsys.readouterr().err == "", "nothing is said of what is refused"
    check_windows(LeakySinglePass(seqlen=24), tiny_model("mistral-window"))
    assert "notice: leaky_single_pass" in capsys.readouterr().err


def test_every_protocol_is_made_from_flags_that_it_has() -> None:
    assert choose_protocol("disjoint", {"seqlen": 40, "stride": None}) == Disjoint(seqlen=40)
    assert {name: choose_protocol(name, {}).name for name in PROTOCOLS} == {name: name for name in PROTOCOLS}
    with pytest.raises(UserError, match="unknown protocol 'disjiont'; did you mean 'disjoint'"):
        choose_protocol("disjiont", {})


def test_of_a_long_text_only_the_beginning_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, prose = models.load_tokenizer(), load_texts(["narrative"])["narrative"].text
    whole = tokenizer.encode(prose, verbose=False)
    assert first_ids(tokenizer, prose) == whole and first_ids(tokenizer, prose, 5) == whole[:5]
    monkeypatch.setattr(long_texts, "PIECE", 20_001)
    seen: list[int] = []
    plain = type(tokenizer).__call__

    def watched(tokenizer: Any, text: str, **options: Any) -> Any:
        seen.append(len(text))
        return plain(tokenizer, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    assert first_ids(tokenizer, prose, 3000) == whole[:3000] and seen == [20_001]
    assert first_ids(tokenizer, prose, 9000) == whole[:9000] and seen == [20_001, 20_001, len(prose)]


@given(tokens=st.integers(2, 400), sizes=st.tuples(*[st.integers(1, 60)] * 4))
def test_a_protocol_reads_no_further_than_it_says(tokens: int, sizes: tuple[int, int, int, int]) -> None:
    prefix, continuation, stride, windows = sizes
    for protocol in (
        PrefillThenContinue(prefix=prefix, continuation=continuation, stride=stride, windows=windows),
        TokenByToken(tokens=prefix + 1),
    ):
        most = protocol.reads()
        assert most is not None and protocol.cut(tokens) == protocol.cut(min(tokens, most))
        reached = [window.end for window in protocol.cut(10_000)]
        assert reached[-1] == most


def test_embedded_texts_say_what_they_are() -> None:
    made = load_texts(["narrative", "code", "qa", "code"])
    assert list(made) == ["narrative", "code", "qa"]
    for text in made.values():
        assert len(text.text) > 20_000 and text.record()["characters"] == len(text.text)
    assert "import" in made["code"].text and made["code"].name == ", ".join(MODULES)
    passage, answered = made["narrative"].text, made["qa"].text
    for piece in passage.split("\n\n"):
        assert piece in answered
    question = answered.index("Question: ")
    assert answered.index(passage.split("\n\n")[0]) < question < answered.index("Answer: ")
    assert "Question: " not in passage


def test_the_command_writes_a_line_for_each_text_method_and_budget(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    protocol = ["--prefix", 64, "--continuation", 8, "--texts", "narrative,qa"]
    methods = ["--method", "fullkv,streamingllm", "--max_capacity_prompts", "16,32"]
    assert command(tiny, tmp_path, *protocol, *methods, "--windows", 1) == 0
    before = load_rows(tmp_path)
    assert command(tiny, tmp_path, *protocol, *methods, "--windows", 2) == 0, "more windows go on"
    rows = load_rows(tmp_path)
    assert rows[: len(before)] == before and len(rows) == 2 * len(before) == 2 * 2 * 3
    printed = capsys.readouterr().out
    assert "perplexity, prefill_then_continue: narrative" in printed and "perplexity.csv" in printed
    with (tmp_path / "perplexity.csv").open() as file:
        lines = list(csv.DictReader(file))
    keys = [(line["text"], line["method"], line["budget"]) for line in lines]
    sizes = ("fullkv", "full"), ("streamingllm", "16"), ("streamingllm", "32")
    assert keys == [(text, *size) for text in ("narrative", "qa") for size in sizes]
    for line in lines:
        mine = [row for row in rows if (row["group"], row["method"]) == (line["text"], line["method"])]
        mine = [row for row in mine if line["budget"] in ("full", str(row["budget"]))]
        assert float(line["nll"]) == pytest.approx(sum(row["nll"] for row in mine) / 2)
        assert float(line["perplexity"]) == pytest.approx(math.exp(float(line["nll"])))
        said = {
            name: line[name] for name in ("protocol", "prefix", "continuation", "dtype", "scored_tokens", "windows")
        }
        assert list(said.values()) == ["prefill_then_continue", "64", "8", "float32", "16", "2"]
    settings = json.loads((tmp_path / "run_meta.json").read_text())["settings"]
    assert settings["sources"]["qa"] == load_texts(["qa"])["qa"].record()
    capsys.readouterr()
    said = refused(command(tiny, tmp_path, *protocol, *methods, "--max_tokens", 400), capsys)
    assert "--max_tokens was not set, is 400" in said


def test_a_text_of_the_users_own_and_the_same_with_other_line_ends(tiny: Path, text: Path, tmp_path: Path) -> None:
    plain = tmp_path / "tale.txt"
    plain.write_text(text.read_text("utf-8-sig"), "utf-8", newline="\n")
    figures = []
    for file in (text, plain):
        save_dir = tmp_path / f"run{len(figures)}"
        flags = ["--protocol", "token_by_token", "--tokens", 60, "--method", "streamingllm", "--text", file]
        assert command(tiny, save_dir, *flags) == 0
        [row] = load_rows(save_dir)
        assert row["group"] == "tale.txt" and row["kept_tokens_max"] == 40 and row["scored_tokens"] == 59
        figures.append(row["nll"])
    assert figures[0] == figures[1]
