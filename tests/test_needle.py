"""The needle benchmark: the first test's rules by golden cases, our own by small tokenizers that are trained here."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvfactory.benchmarks.haystack import (
    Haystack,
    TokenizedHaystack,
    insert_needle,
    load_haystack,
    sentence_ends,
    split_point,
)
from kvfactory.benchmarks.needle import Needle, depth_grid, logistic
from kvfactory.benchmarks.needle_styles import Sandwich
from kvfactory.errors import UserError

WORDS = "the a river stone house walks under over green slow night morning finds keeps seven open"
TEMPLATE = re.compile(
    r"A special magic number is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the number afterwards\.\n(?P<context>.*)\n"
    r"What is the special magic number for (?P<key>[a-z]+-[a-z]+) mentioned in the provided text\? "
    r"The special magic number for (?P=key) mentioned in the provided text is",
    re.DOTALL,
)


def story(sentences, seed=0):
    rng = random.Random(seed)
    return " ".join(
        " ".join(rng.choices(WORDS.split(), k=rng.randint(3, 18))).capitalize() + "." for _ in range(sentences)
    )


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---- Tokenizers


def byte_level():
    """As Llama 3's: a blank belongs to the word after it, no special tokens are added."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([story(300)], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def word_marking():
    """As Llama 2's: a full stop by itself is another id than one after a word, and a BOS goes first."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    apart = pre_tokenizers.Split(Regex(r"▁?(\w+|[^\w▁]+)"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), apart])
    bpe.decoder = decoders.Metaspace()
    ascii_ = [chr(code) for code in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ascii_, special_tokens=["<unk>", "<s>"])
    bpe.train_from_iterator([story(300), WORDS.replace(" ", " . ")], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


BYTE_LEVEL, WORD_MARKING = byte_level(), word_marking()
TOKENIZERS = {"byte_level": BYTE_LEVEL, "word_marking": WORD_MARKING}
STORY = Haystack(story(120, seed=1), "story", "1")


def needle(tokenizer=BYTE_LEVEL, **changes):
    defaults = {"style": "number", "lengths": [500], "depths": [50], "samples": 1, "haystack": STORY}
    return Needle(tokenizer, **{**defaults, **changes})


def only(benchmark):
    """The prompt of a benchmark of one example, and the example."""
    (example,) = benchmark.examples()
    return benchmark.prompt_ids(example), example


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chat(tokenizer):
    def wrap(text, answer_prefix):
        return tokenizer.encode(f"Question: {text} Answer:{answer_prefix}", add_special_tokens=False)

    return wrap


# ---- Golden cases of the first needle test and of KVCache-Factory's


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "niah_public.json").read_text())


@pytest.fixture(scope="module")
def essays(shared, golden):
    text = load_haystack(shared / "data" / "pg_essays").text[:40000]
    assert sha256(text) == golden["haystack"]["sha256"]
    return Haystack(text, "essays", "49 files")


@pytest.fixture(scope="module")
def smollm2():
    from kvfactory.models import load_tokenizer

    return load_tokenizer(None)


def test_insertion_is_the_first_tests(golden, essays, smollm2):
    hay = TokenizedHaystack(essays, smollm2)
    needle_ids = hay.encode(Sandwich.needle)
    for case in golden["insert"]:
        length = case["context_length"]
        ids = insert_needle(hay.window(0, length), needle_ids, case["depth_percent"], hay.stops, length - 200)
        text = hay.decode(ids)
        assert text.index(Sandwich.needle) == case["needle_char_index"], case["id"]
        assert len(hay.encode(text)) == case["n_tokens"], case["id"]
        assert sha256(text) == case["output_sha256"], case["id"]


def test_the_plain_sandwich_prompt_is_byte_for_byte_kvcache_factorys(golden, essays, smollm2):
    cases = {(c["context_length"], c["depth_percent"]): c for c in golden["insert"] if "prompt_sha256" in c}
    lengths, depths = ({key[axis] for key in cases} for axis in (0, 1))
    grid = Needle(smollm2, style="sandwich", lengths=[*lengths], depths=[*depths], samples=1, haystack=essays)
    checked = 0
    for example in grid.examples():
        case = cases.get((example.info["context_length"], example.info["depth_percent"]))
        if case:
            text = smollm2.decode(grid.prompt_ids(example), clean_up_tokenization_spaces=False)
            assert sha256(text) == case["prompt_sha256"], case["id"]
            checked += 1
    assert checked == len(cases) > 0


def test_both_scores_of_the_sandwich(golden):
    sandwich = needle(style="sandwich")
    (example,) = sandwich.examples()
    for case in golden["scores"]:
        scores = sandwich.score(example, case["response"])
        assert scores["score"] == pytest.approx(case["visualize_word_recall"], abs=1e-9), case["id"]
        assert scores["rouge1"] == pytest.approx(case["tester_score_rouge1_x10"] / 10, abs=1e-9), case["id"]


def test_words_are_stemmed_for_rouge():
    benchmark = needle(style="sandwich")
    (example,) = benchmark.examples()
    scores = benchmark.score(example, "sandwiches, parks")
    assert scores["rouge1"] == pytest.approx(2 * 2 / (2 + 21))  # two words found; two were said, 21 hidden
    assert scores["score"] == 0


def test_logistic_depths(golden):
    for case in golden["logistic"]:
        assert logistic(case["x"]) == pytest.approx(case["kvcache_factory"], abs=1e-9)
        mirrored = logistic(100 - case["x"]) if case["x"] not in (0, 100) else case["x"]
        assert mirrored == pytest.approx(case["gkamradt"], abs=1e-9)


def test_the_number_is_asked_for_as_ruler_does(shared):
    rows = (shared / "data/ruler/official_gen_smollm2/2048/niah_single_2.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        found = TEMPLATE.fullmatch(row["input"] + row["answer_prefix"])
        assert found
        assert f"One of the special magic numbers for {found['key']} is: {row['outputs'][0]}." in found["context"]


# ---- The number style


@pytest.mark.parametrize("wrap", [chat, None], ids=["chat", "plain"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_prompt_is_as_long_as_the_context_length_says(tokenizer, wrap, data):
    digits = data.draw(st.integers(1, 9), "digits")
    how = {"digits": digits, "chat": wrap and wrap(tokenizer), "seed": data.draw(st.integers(0, 99), "seed")}
    shortest = needle(tokenizer, **how)._style.shortest
    length = data.draw(st.integers(shortest, shortest + 900), "length")
    depth = data.draw(st.floats(0, 100), "depth")
    ids, _ = only(needle(tokenizer, lengths=[length], depths=[depth], **how))
    assert length - 30 <= len(ids) <= length


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(length=st.integers(400, 1500), depth=st.floats(0, 100), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_needle_is_there_once_and_at_its_depth(tokenizer, length, depth, seed):
    ids, example = only(needle(tokenizer, lengths=[length], depths=[depth], seed=seed))
    found = TEMPLATE.fullmatch(text_of(tokenizer, ids))
    assert found
    assert found["key"] == example.info["key"]
    assert example.answers == [example.info["expected"]]
    sentence = f"One of the special magic numbers for {found['key']} is: {example.info['expected']}."
    before, after = found["context"].split(sentence)  # fails unless it is there exactly once

    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    wanted = (tokens(before) + tokens(after)) * depth / 100
    if depth == 0:
        assert before == ""
    elif depth == 100:
        assert after == ""
    else:
        assert before.endswith(". ")
        assert after.startswith(" ")
        next_sentence = re.match(r".*?\.(?=\s)|.*", after, re.DOTALL)[0]
        first_sentence = len(re.findall(r"\.(?=\s)", before)) == 1
        assert first_sentence or tokens(before) <= wanted + 3
        assert tokens(before + next_sentence) >= wanted - 3


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_only_the_ends_of_the_range_are_the_ends_of_the_text(tokenizer):
    begins, finishes = [], []
    for depth in (0, 0.01, 99.99, 100):
        ids, example = only(needle(tokenizer, depths=[depth]))
        context = TEMPLATE.fullmatch(text_of(tokenizer, ids))["context"]
        begins.append(context.startswith("One of the special"))
        finishes.append(context.endswith(f"is: {example.info['expected']}."))
    assert begins == [True, False, False, False]
    assert finishes == [False, False, False, True]


def test_depths_between_the_ends_differ_with_every_tokenizer():
    for tokenizer in TOKENIZERS.values():
        places = []
        for depth in range(0, 101, 10):
            ids, _ = only(needle(tokenizer, lengths=[2000], depths=[depth]))
            context = TEMPLATE.fullmatch(text_of(tokenizer, ids))["context"]
            places.append(context.index("One of the special") / len(context))
        assert places[0] == 0
        assert places == sorted(set(places))
        assert places[5] == pytest.approx(0.5, abs=0.05)


def test_full_stops_are_found_by_the_tokenizer():
    plain, marking = (TokenizedHaystack(STORY, each) for each in (BYTE_LEVEL, WORD_MARKING))
    assert plain.stops == {BYTE_LEVEL.convert_tokens_to_ids(".")}
    assert marking.stops == set(WORD_MARKING.convert_tokens_to_ids([".", "▁."]))
    assert [len(each.sentence_starts) for each in (plain, marking)] == [120, 120]


def test_a_full_stop_inside_a_name_or_number_ends_no_sentence():
    for tokenizer in TOKENIZERS.values():
        hay = TokenizedHaystack(Haystack("Ask sys.path for 3.14 (a. b).\n\nThen go.", "", ""), tokenizer)
        rest = [hay.decode(hay.ids[start:]).strip() for start in hay.sentence_starts]
        assert rest == ["Ask sys.path for 3.14 (a. b).\n\nThen go.", "b).\n\nThen go.", "Then go."]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0, 100))
def test_split_point_against_a_slow_search(ids, depth):
    ends = {(1, 2), (3, 0)}
    inside = [i for i in range(1, len(ids)) if (ids[i - 1], ids[i]) in ends]
    assert sentence_ends(ids, ends) == inside
    target = depth / 100 * len(ids)
    expected = max((i for i in inside if i <= target), default=inside[0] if inside else int(target))
    if depth == 0:
        expected = 0
    if depth == 100:
        expected = len(ids)
    assert split_point(ids, depth, ends) == expected


def test_a_cell_does_not_depend_on_what_else_is_run():
    large = needle(lengths=[400, 700], depths=[0, 50, 100], samples=4)
    prompts = {example.id: large.prompt_ids(example) for example in reversed(large.examples())}
    assert len(prompts) == 24
    for length, depth in ((400, 0), (700, 50)):
        small = needle(lengths=[length], depths=[depth], samples=2)
        assert [example.id for example in small.examples()] == [f"number4/{length}/depth{depth}/{k}" for k in (0, 1)]
        for example in small.examples():
            assert small.prompt_ids(example) == prompts[example.id]
    assert needle().examples() == needle().examples()


def test_a_cell_is_the_same_in_every_process():
    (example,) = needle(lengths=[512], depths=[37.5], digits=7).examples()
    assert example.id == "number7/512/depth37.5/0"
    assert example.group == "512"
    assert example.info == {
        "style": "number",
        "context_length": 512,
        "depth_percent": 37.5,
        "sample": 0,
        "key": "smooth-pebble",
        "expected": "3241243",
        "digits": 7,
        "haystack_start": 624,
    }


def test_samples_and_seeds_differ():
    samples = needle(samples=120).examples()
    assert len({example.info["haystack_start"] for example in samples}) == 120  # as many as there are sentences
    assert len({example.info["key"] for example in samples}) > 100
    assert len({example.info["expected"] for example in samples}) > 100
    (first,), (second,) = (needle(seed=seed).examples() for seed in (1, 2))
    assert first.id == second.id
    assert first.info["expected"] != second.info["expected"]


@given(st.integers(1, 12), st.integers(0, 500))
def test_a_value_has_its_digits(digits, sample_seed):
    (example,) = needle(digits=digits, seed=sample_seed).examples()
    assert re.fullmatch(rf"[1-9]\d{{{digits - 1}}}", example.info["expected"])
    assert digits < example.max_new_tokens <= digits + 10


def test_the_number_is_right_wherever_it_occurs():
    benchmark = needle()
    (example,) = benchmark.examples()
    value = example.info["expected"]
    assert benchmark.score(example, f" {value}. The text") == {"score": 1.0}
    assert benchmark.score(example, f"\n\tis: 0{value}") == {"score": 1.0}
    assert benchmark.score(example, value[:-1]) == {"score": 0.0}
    assert benchmark.score(example, "") == {"score": 0.0}


# ---- The sandwich style


def test_the_sandwich_in_a_chat_is_a_question_and_the_beginning_of_its_answer():
    heard = []
    benchmark = needle(style="sandwich", lengths=[600], chat=lambda *turn: heard.append(turn) or [1, 2, 3])
    assert only(benchmark)[0] == [1, 2, 3]
    ((text, prefix),) = heard
    assert text.endswith("Question: What is the best thing to do in San Francisco?")
    assert prefix == "The best thing to do in San Francisco is"
    assert text.count(Sandwich.needle) == 1
    assert "<|im_start|>" not in text  # inside a chat it would begin another turn


def test_only_the_first_sandwich_begins_where_the_haystack_does():
    benchmark = needle(style="sandwich", lengths=[600], depths=[100], samples=20)
    starts = [example.info["haystack_start"] for example in benchmark.examples()]
    assert starts[0] == 0
    assert len(set(starts)) == 20
    other = needle(style="sandwich", samples=20, seed=7).examples()
    assert other[0].info["haystack_start"] == 0
    assert [example.info["haystack_start"] for example in other] != starts
    book = [re.search("<book> *(.{40})", text_of(BYTE_LEVEL, benchmark.prompt_ids(e)))[1] for e in benchmark.examples()]
    hay = TokenizedHaystack(STORY, BYTE_LEVEL)
    assert book == [hay.decode(hay.window(start, 60)).strip()[:40] for start in starts]


def test_where_an_answer_ends():
    (sandwich,) = needle(style="sandwich").examples()
    assert sandwich.stop_ids == {BYTE_LEVEL.encode("\n")[-1]}
    assert sandwich.max_new_tokens == 30
    assert sandwich.answers == [Sandwich.expected]
    assert sandwich.id == "sandwich/500/depth50/0"
    (number,) = needle().examples()
    assert number.stop_ids == frozenset()
    assert number.min_new_tokens == sandwich.min_new_tokens == 0


# ---- The grid


def test_the_grid_in_order():
    ids = [example.id for example in needle(lengths=[500, 400], depths=[100, 0], samples=2, digits=5).examples()]
    assert ids == [f"number5/{n}/depth{d}/{k}" for n in (500, 400) for d in (100, 0) for k in (0, 1)]


def test_depth_grids():
    assert depth_grid(10) == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert depth_grid(1) == [0]
    sigmoid = depth_grid(5, "sigmoid")
    assert sigmoid == [0, 7.586, 50, 92.414, 100]
    with pytest.raises(UserError, match="did you mean 'sigmoid'"):
        depth_grid(5, "sigmoidal")
    with pytest.raises(UserError, match="--depths: 0"):
        depth_grid(0)


def test_the_haystack_is_tokenised_once_and_prompts_when_asked_for(monkeypatch):
    texts = []
    encode = BYTE_LEVEL.encode
    monkeypatch.setattr(BYTE_LEVEL, "encode", lambda text, **how: texts.append(text) or encode(text, **how))
    benchmark = needle(depths=[0, 50, 100], samples=2)
    before = len(texts)
    examples = benchmark.examples()
    assert len(texts) == before
    for example in examples:
        benchmark.prompt_ids(example)
    assert len(texts) >= before + 6
    assert texts.count(STORY.text) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "sandwhich"}, "unknown needle style 'sandwhich'; did you mean 'sandwich'"),
        ({"lengths": []}, "--context_lengths: at least one"),
        ({"lengths": [500, 500]}, "--context_lengths: 500 is given 2 times"),
        ({"depths": []}, "--depths: at least one"),
        ({"depths": [-0.5]}, "--depths -0.5: a depth is a percentage, 0 to 100"),
        ({"depths": [50, 101]}, "--depths 101:"),
        ({"depths": [float("nan")]}, "--depths nan:"),
        ({"depths": [50, 10, 50.0]}, "--depths: 50 is given 2 times"),
        ({"samples": 0}, "--samples 0:"),
        ({"digits": 0}, "--digits 0:"),
        ({"style": "sandwich", "digits": 4}, "--digits is a setting of the needle style 'number'"),
    ],
)
def test_a_grid_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        needle(**changes)


@pytest.mark.parametrize("style", ["number", "sandwich"])
def test_the_shortest_context_length_is_told_and_works(style):
    with pytest.raises(UserError, match=r"--context_lengths 40: too short .* possible is \d+") as told:
        needle(style=style, lengths=[900, 40])
    shortest = int(re.search(r"\d+$", str(told.value))[0])
    with pytest.raises(UserError, match=f"{shortest - 1}: too short"):
        needle(style=style, lengths=[shortest - 1])
    benchmark = needle(style=style, lengths=[shortest], depths=[50], samples=20)
    for example in benchmark.examples():
        text = text_of(BYTE_LEVEL, benchmark.prompt_ids(example))
        hidden = Sandwich.needle if style == "sandwich" else f"{example.info['key']} is: {example.info['expected']}."
        assert text.count(hidden) == 1


def test_lengths_beyond_a_million_are_told_apart():
    assert len(needle(lengths=[1_000_000, 1_000_001]).examples()) == 2


# ---- Haystacks


def test_the_default_haystack_is_prose():
    haystack = load_haystack()
    assert len(haystack.text) > 100_000
    assert "Assert statements are a convenient way" not in haystack.text  # that paragraph introduces code
    for code in ("::=", ">>>", "****", "----", "\n", "  "):
        assert code not in haystack.text, code
    long_sentences = [each for each in haystack.text.split(". ") if len(each) > 200]
    assert len(set(long_sentences)) > 0.98 * len(long_sentences)  # topics contain each other; their text comes once
    record = haystack.record()
    assert record["sha256"] == sha256(haystack.text)
    assert record["characters"] == len(haystack.text)
    assert record["name"] == "pydoc_data.topics"
    assert re.fullmatch(r"Python 3\.\d+\..*", record["version"])
    json.dumps(record)
    assert load_haystack() == haystack


def test_a_folder_is_read_in_order_of_name_and_joined_with_nothing(tmp_path):
    (tmp_path / "b.txt").write_text("Second.")
    (tmp_path / "a.txt").write_text("First.\n")
    (tmp_path / "c.md").write_text("Never.")
    haystack = load_haystack(tmp_path)
    assert haystack.text == "First.\nSecond."
    assert haystack.version == "2 files"
    assert load_haystack(tmp_path / "c.md").text == "Never."


def test_a_haystack_that_is_not_there(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=f"--haystack {empty}: the folder holds no .txt file"):
        load_haystack(empty)
    (empty / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match=f"--haystack {empty}: there is no text"):
        load_haystack(empty)
    with pytest.raises(UserError, match=r"--haystack .*missing: No such file"):
        load_haystack(tmp_path / "missing")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1\.txt: not UTF-8 text \(byte 3\)"):
        load_haystack(tmp_path)


@given(st.integers(0, 40), st.integers(0, 200))
def test_a_window_goes_round(start, count):
    hay = TokenizedHaystack(Haystack("Over the river. Under the stone.", "", ""), BYTE_LEVEL)
    start %= len(hay.ids)
    assert hay.window(start, count) == [hay.ids[(start + i) % len(hay.ids)] for i in range(count)]


def test_a_short_haystack_is_repeated():
    ids, _ = only(needle(lengths=[900], haystack=Haystack("Over the river. Under the stone. ", "", "")))
    assert 870 <= len(ids) <= 900
    assert text_of(BYTE_LEVEL, ids).count("Over the river.") > 20


def test_without_a_sentence_end_the_needle_is_at_its_depth():
    ids, _ = only(needle(depths=[30], haystack=Haystack("green river " * 50, "", "")))
    context = TEMPLATE.fullmatch(text_of(BYTE_LEVEL, ids))["context"]
    before, after = re.split("One of the special.*?[.]", context)
    assert len(before) / len(before + after) == pytest.approx(0.3, abs=0.03)


def test_a_tokenizer_that_cannot_spell_the_haystack_is_told():
    benchmark = needle(WORD_MARKING, haystack=Haystack("каша " * 300, "", ""))
    with pytest.raises(UserError, match="--haystack: no stretch of it makes a prompt of 500 tokens"):
        only(benchmark)
