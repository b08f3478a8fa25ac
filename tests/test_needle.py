"""The needle benchmark: the first test's rules by golden cases, our own by small tokenizers that are trained here."""

from __future__ import annotations

import hashlib
import json
import random
import re

import numpy as np
import pytest
import torch
from entry_points import run_needle
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvfactory.benchmarks.haystack import (
    Haystack,
    TokenizedHaystack,
    insert_needle,
    load_haystack,
    sentence_ends,
    split_point,
)
from kvfactory.benchmarks.needle import GRIDS, STYLES, Needle, choose_grid, depth_grid, logistic
from kvfactory.benchmarks.needle_sandwich import Original, Sandwich
from kvfactory.chat import chat_ids
from kvfactory.errors import UserError
from kvfactory.results import load_rows
from kvfactory.testing import TINY_CONFIGS
from scripts import load_script

WORDS = "the a river stone house walks under over green slow night morning finds keeps seven open"
TEMPLATE = re.compile(
    r"A special magic number is hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the number afterwards\.\n(?P<context>.*)\n"
    r"What is the special magic number for (?P<key>[a-z]+-[a-z]+) mentioned in the provided text\? "
    r"The special magic number for (?P=key) mentioned in the provided text is",
    re.DOTALL,
)

SEVERAL = re.compile(
    r"Some special magic numbers are hidden within the following text\. Make sure to memorize it\. "
    r"I will quiz you about the numbers afterwards\.\n(?P<context>.*)\n"
    r"What are all the special magic numbers for (?P<query>[a-z, -]+) mentioned in the provided text\? "
    r"The special magic numbers for (?P=query) mentioned in the provided text are",
    re.DOTALL,
)
EVERY_STYLE = [{"style": style} for style in STYLES] + [{"style": "number", "needles": 3}]


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


def test_several_numbers_are_asked_for_as_ruler_does(shared):
    rows = (shared / "data/ruler/official_gen_smollm2/2048/niah_multiquery.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        found = SEVERAL.fullmatch(row["input"] + row["answer_prefix"])
        assert found
        keys = re.split(", and |, ", found["query"])
        assert len(keys) == len(row["outputs"]) == 4
        for key, value in zip(keys, row["outputs"], strict=True):
            assert f"One of the special magic numbers for {key} is: {value}." in found["context"]


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


@pytest.mark.parametrize("how", EVERY_STYLE, ids=lambda how: "-".join(map(str, how.values())))
def test_a_cell_does_not_depend_on_what_else_is_run(how):
    large = needle(lengths=[900, 700], depths=[0, 50, 100], samples=4, **how)
    all_of_it = {example.id: (example, large.prompt_ids(example)) for example in reversed(large.examples())}
    assert len(all_of_it) == 24
    label = large._style.label
    for length, depth in ((700, 0), (900, 50)):
        small = needle(lengths=[length], depths=[depth], samples=2, **how)
        assert [example.id for example in small.examples()] == [f"{label}/{length}/depth{depth}/{k}" for k in (0, 1)]
        for example in small.examples():
            assert (example, small.prompt_ids(example)) == all_of_it[example.id]
    assert needle(**how, lengths=[700]).examples() == needle(**how, lengths=[700]).examples()


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


# ---- Several numbers


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(count=st.integers(2, 5), extra=st.integers(0, 900), depth=st.floats(0, 100), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_all_needles_are_there_at_their_depths_in_one_prompt(tokenizer, count, extra, depth, seed):
    length = needle(tokenizer, needles=count, lengths=[9999])._style.shortest + extra
    ids, example = only(needle(tokenizer, needles=count, lengths=[length], depths=[depth], seed=seed))
    assert length - 30 <= len(ids) <= length
    found = SEVERAL.fullmatch(text_of(tokenizer, ids))
    assert found
    hidden = example.info["needles"]
    assert len({each["key"] for each in hidden}) == len({each["value"] for each in hidden}) == count
    assert [each["value"] for each in hidden] == example.answers
    *keys, last = (each["key"] for each in hidden)
    assert found["query"] == f"{', '.join(keys)}, and {last}"
    depths = [each["depth_percent"] for each in hidden]
    assert depths == pytest.approx([depth + each * (100 - depth) / count for each in range(count)])
    rest, parts = found["context"], []
    for each in hidden:
        before, rest = rest.split(f"One of the special magic numbers for {each['key']} is: {each['value']}.")
        parts.append(before)
    sizes = [len(tokenizer.encode(part, add_special_tokens=False)) for part in (*parts, rest)]
    assert (depth == 0) <= (parts[0] == "")
    assert (depth == 100) <= (rest == "" and parts[1:] == [" "] * (count - 1))
    for i in range(
        1, count
    ):  # a needle may be early by its sentence of 20 words, or late where it has no end before it
        assert abs(sum(sizes[: i + 1]) / sum(sizes) * 100 - depths[i]) <= 100 * 60 / sum(sizes)


def test_the_first_of_several_is_the_one_that_is_alone():
    (alone,), (several,) = (needle(needles=count, lengths=[800]).examples() for count in (None, 4))
    assert needle(needles=1, lengths=[800]).examples() == [alone]
    assert several.info["needles"][0] == {
        "key": alone.info["key"],
        "value": alone.info["expected"],
        "depth_percent": 50,
    }
    assert (several.id, several.group) == ("number4x4/800/depth50/0", "800")
    assert several.info["haystack_start"] == alone.info["haystack_start"]
    json.dumps(several.info)


def test_several_score_by_the_share_that_is_found():
    benchmark = needle(needles=4, lengths=[800])
    (example,) = benchmark.examples()
    one, two, three, four = example.answers
    assert benchmark.score(example, f" {two}, {one}, and {four}; {two}") == {"score": 0.75}
    assert benchmark.score(example, f"{three}") == {"score": 0.25}
    assert benchmark.score(example, "") == {"score": 0.0}
    assert benchmark.score(example, " ".join(example.answers)) == {"score": 1.0}


def test_an_answer_may_name_every_key_with_its_number():
    for tokenizer in TOKENIZERS.values():
        (example,) = needle(tokenizer, needles=6, digits=7, lengths=[1200]).examples()
        spelt = "".join(f" {each['key']}: {each['value']}\n" for each in example.info["needles"])
        assert len(tokenizer.encode(spelt, add_special_tokens=False)) <= example.max_new_tokens


def test_as_many_needles_as_there_are_numbers():
    (example,) = needle(digits=1, needles=9, lengths=[1500]).examples()
    assert sorted(example.answers) == [*"123456789"]


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


def kvcache_factorys(tokenizer, text, length, depth):
    """The plain prompt, by the steps that its code takes: trimmed as text, encoded again, one token back at a time."""

    def encode(words):
        return tokenizer.encode(words, add_special_tokens=False)

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    context, hidden = encode(decode(encode(text)[:length])), encode(Sandwich.needle)
    stops = encode(".")[-1], encode("a.")[-1]
    if len(context) + len(hidden) > length - 200:
        context = context[: length - 200 - len(hidden)]
    if depth == 100:
        context = context + hidden
    else:
        point = int(len(context) * (depth / 100))
        before = context[:point]
        while before and before[-1] not in stops:
            point -= 1
            before = context[:point]
        context = before + hidden + context[point:]
    return (
        f"<|im_start|> This is a very long story book: <book> {decode(context)} </book>.\n Based on the content of the "
        "book, Question: The best thing to do in San Francisco is: \nAnswer:"
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(length=st.integers(330, 1400), depth=st.sampled_from([0, 11, 22, 33.3, 50, 89, 99, 100]))
@settings(max_examples=25, deadline=None)
def test_the_plain_sandwich_is_kvcache_factorys_with_any_tokenizer(tokenizer, length, depth):
    ids, _ = only(needle(tokenizer, style="sandwich", lengths=[length], depths=[depth]))
    assert ids == tokenizer.encode(kvcache_factorys(tokenizer, STORY.text, length, depth))


# ---- The first test's own turns


ASKED = (
    "What is the best thing to do in San Francisco? Don't give information outside the document or repeat your findings"
)
SYSTEM = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct"


def test_the_first_tests_turns_and_contexts(golden, essays, smollm2):
    cases = {
        (each["context_length"], float(each["depth_percent"])): each["output_sha256"]
        for each in golden["insert"]
        if each["variant"] == "gkamradt"
    }
    lengths, depths = ({key[axis] for key in cases} for axis in (0, 1))
    heard = []

    def listen(text, answer_prefix, earlier=()):
        heard.append((text, answer_prefix, *earlier))
        return [1]

    grid = {"lengths": sorted(lengths), "depths": sorted(depths), "samples": 1, "haystack": essays}
    benchmark = Needle(smollm2, style="original", **grid, chat=listen)
    for example in benchmark.examples():
        wanted = cases.pop((example.info["context_length"], example.info["depth_percent"]), None)
        if wanted:
            assert benchmark.prompt_ids(example) == [1]
            asked, prefix, system, context = heard.pop()
            assert (asked, prefix) == (ASKED, "")
            assert system == {"role": "system", "content": SYSTEM}
            assert context["role"] == "user"
            assert sha256(context["content"]) == wanted
    assert not cases


def test_the_first_tests_turns_in_a_template(smollm2):
    benchmark = Needle(
        smollm2,
        style="original",
        lengths=[500],
        depths=[50],
        samples=1,
        haystack=STORY,
        chat=lambda *turns: chat_ids(smollm2, *turns),
    )
    said = smollm2.decode(only(benchmark)[0])
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n|$)", said, re.DOTALL)
    assert [role for role, _ in turns] == ["system", "user", "user", "assistant"]
    (_, system), (_, context), (_, asked), (_, answer) = turns
    assert (system, asked, answer) == (SYSTEM, ASKED, "")
    assert context.count(Sandwich.needle) == 1


def test_the_first_tests_turns_without_a_template():
    ids, _ = only(needle(style="original"))
    system, context, asked = re.fullmatch(r"(.*?)\n\n(.*)\n\n(.*)", text_of(BYTE_LEVEL, ids), re.DOTALL).groups()
    assert (system, asked) == (SYSTEM, ASKED)
    assert context.count(Original.needle) == 1
    assert len(BYTE_LEVEL.encode(context)) <= 300  # of 500 tokens, 200 are the wording's and the answer's


def test_the_first_tests_answers_have_the_scores_of_the_sandwich():
    original, sandwich = needle(style="original"), needle(style="sandwich")
    (one,), (other,) = original.examples(), sandwich.examples()
    assert one.info == {**other.info, "style": "original"}
    assert (one.answers, one.id) == (other.answers, "original/500/depth50/0")
    for said in ("", "Eat a sandwich in Dolores Park.", Sandwich.needle):
        assert original.score(one, said) == sandwich.score(other, said)
    assert set(original.score(one, "Eat.")) == {"score", "rouge1"}


def test_where_an_answer_ends():
    (original,) = needle(style="original").examples()
    assert (original.max_new_tokens, original.stop_ids, original.min_new_tokens) == (300, frozenset(), 0)
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


def test_published_grids():
    original, factory = (choose_grid(name) for name in ("original", "kvcache-factory"))
    assert [*original.lengths] == np.round(np.linspace(1000, 16000, 35)).astype(int).tolist()
    assert [*original.depths] == np.round(np.linspace(0, 100, 35)).astype(int).tolist()
    assert [*factory.lengths] == np.arange(1000, 8001 + 1, 100).tolist()
    assert [*factory.depths] == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert original.notice is factory.notice is None
    curve = {x: np.round(100 / (1 + np.exp(-0.1 * (x - 50))), 3) for x in np.linspace(0, 100, 35)[1:-1]}
    assert choose_grid("original", spacing="sigmoid").depths == pytest.approx([0, *curve.values(), 100])
    mirrored = [round(100 - depth, 3) for depth in reversed(choose_grid("original", spacing="sigmoid").depths)]
    assert mirrored == pytest.approx(choose_grid("original", spacing="sigmoid").depths, abs=1.1e-3)


def test_an_axis_that_is_given_stands_in_place_of_the_grids():
    both = choose_grid("original", lengths=[512], depths=[7.5])
    assert (both.lengths, both.depths) == ([512], [7.5])
    assert len(choose_grid("original", lengths=[512]).depths) == 35
    assert len(choose_grid("kvcache-factory", depths=[7.5]).lengths) == 71
    assert choose_grid("list", window=8192) == choose_grid("list")


def test_a_grid_ends_where_the_models_window_does():
    whole, cut = (choose_grid("original", window=window) for window in (16000, 15999))
    assert (whole.lengths, whole.notice) == (choose_grid("original").lengths, None)
    assert cut.lengths == whole.lengths[:-1]
    assert cut.notice == (
        "--grid original: 1 of 35 context lengths are beyond the model's window of 15999 tokens and left out"
    )
    assert choose_grid("original", lengths=[2000], window=2000).notice is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"name": "orignal"}, "unknown grid 'orignal'; did you mean 'original'?"),
        ({"name": "original", "window": 999}, "--grid original: 35 of 35 context lengths are beyond"),
        ({"lengths": [512, 2049], "window": 2048}, "--context_lengths 2049: longer than the model's window of 2048"),
        (
            {"spacing": "sigmoid"},
            "--depth_spacing sigmoid: the depths of --grid list are a list; it is for original, kv",
        ),
        ({"name": "original", "spacing": "cubic"}, "unknown depth spacing 'cubic'"),
        ({"name": "original", "spacing": "linear", "depths": [1]}, "--depth_spacing linear: it does not move"),
    ],
)
def test_a_grid_that_does_not_fit(how, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_grid(**{"name": "list", **how})


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
        (
            {"style": "original", "needles": 2},
            "--needles is a setting of the needle style 'number'; 'original' has none",
        ),
        ({"needles": 0}, "--needles 0: at least 1"),
        ({"needles": 10, "digits": 1}, "--needles 10: no more than 9 can differ with --digits 1"),
        ({"needles": 2305}, "--needles 2305: no more than 2304"),
    ],
)
def test_a_grid_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        needle(**changes)


@pytest.mark.parametrize("how", EVERY_STYLE, ids=lambda how: "-".join(map(str, how.values())))
def test_the_shortest_context_length_is_told_and_works(how):
    with pytest.raises(UserError, match=r"--context_lengths 40: too short .* possible is \d+") as told:
        needle(**how, lengths=[900, 40])
    shortest = int(re.search(r"\d+$", str(told.value))[0])
    with pytest.raises(UserError, match=f"{shortest - 1}: too short"):
        needle(**how, lengths=[shortest - 1])
    benchmark = needle(**how, lengths=[shortest], depths=[50], samples=20)
    for example in benchmark.examples():
        text = text_of(BYTE_LEVEL, benchmark.prompt_ids(example))
        hidden = [f" is: {value}." for value in example.answers] if how["style"] == "number" else [Sandwich.needle]
        assert [text.count(each) for each in hidden] == [1] * len(hidden)


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


def test_rows_of_a_jsonl_file_are_joined_with_empty_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": ""}\r\n{"text": " = A = \\n"}\n\n{"text": "b"}\n')
    assert load_haystack(path).text == "\n\n = A = \n\n\nb"
    for line in ("[1]", "oops", '{"text": 3}', '{"no": ""}'):
        path.write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(UserError, match=r"--text .*rows.jsonl:2: not a row"):
            load_haystack(path, "--text")


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


# ---- The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random model whose window is 1024 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": len(BYTE_LEVEL), "max_position_embeddings": 1024}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY_CONFIGS["llama"].to_dict() | sizes)).save_pretrained(folder)
    BYTE_LEVEL.save_pretrained(folder)
    (folder / "story.txt").write_text(STORY.text)
    return folder


def arguments(tiny, folder, **flags):
    usual = {"method": "streamingllm", "max_capacity_prompts": 64, "model_path": tiny, "device": "cpu"}
    usual |= {"save_dir": folder, "haystack": tiny / "story.txt", "samples": 1, "dtype": "float32"}
    return [str(part) for name, value in (usual | flags).items() for part in (f"--{name}", value)]


def test_a_grid_may_grow_in_its_folder(tiny, tmp_path):
    whole = {"context_lengths": "560,480", "depths": "0,50", "samples": 2, "needles": 2, "digits": 1}
    assert run_needle(arguments(tiny, tmp_path, **whole | {"context_lengths": 480, "samples": 1})) == 0
    part = load_rows(tmp_path)
    assert run_needle(arguments(tiny, tmp_path, **whole)) == 0
    rows = load_rows(tmp_path)
    assert rows[: len(part)] == part
    grid = {"lengths": [560, 480], "depths": [0, 50], "samples": 2, "needles": 2, "digits": 1}
    examples = {example.id: example for example in needle(**grid).examples()}
    assert (len(part), len(rows)) == (2, len(examples)) == (2, 8)
    for row in rows:
        example = examples.pop(row["example_id"])
        assert (row["answers"], row["needles"]) == (example.answers, example.info["needles"])
        assert row["score"] == sum(value in row["prediction"] for value in example.answers) / 2
    assert (tmp_path / "plots" / "needle_all.png").is_file()


def test_what_a_published_grid_leaves_out_is_said(tiny, tmp_path, capsys):
    how = {"grid": "original", "depths": 50, "style": "sandwich"}
    assert run_needle(arguments(tiny, tmp_path, **how)) == 0
    said = (
        "notice: --grid original: 34 of 35 context lengths are beyond the model's window of 1024 tokens and left out\n"
    )
    assert said in capsys.readouterr().err
    (row,) = load_rows(tmp_path)
    assert row["example_id"] == "sandwich/1000/depth50/0"
    visualize = load_script("visualize_needle")
    with pytest.raises(SystemExit) as stop:
        visualize.main([str(tmp_path), "--score", "rouge1", "--output", str(tmp_path / "rouge")])
    assert stop.value.code == 0
    assert (tmp_path / "rouge" / "plots" / "needle_all.png").is_file()


def test_flags_of_a_grid_that_cannot_be(tiny, tmp_path, capsys):
    for flags, words in (
        ({"context_lengths": "512,1025"}, "--context_lengths 1025: longer than the model's window of 1024 tokens"),
        ({"depth_spacing": "sigmoid"}, "--depth_spacing sigmoid"),
    ):
        assert run_needle(arguments(tiny, tmp_path, **flags)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert words in said
        assert said.count("\n") == 1


def test_defaults_of_the_command_are_those_of_before():
    grid = choose_grid("list")
    assert [*grid.lengths] == [512, 1024]
    assert [*grid.depths] == [10, 30, 50, 70, 90]
    assert [*GRIDS] == ["list", "original", "kvcache-factory"]
