"""KIVI: keep everything in 2 or 4 bits, keys in groups along tokens and values along channels (arXiv 2402.02750).

Keys have channels of large magnitude that few tokens share a scale with, so a group is 32 tokens of one channel; values have
none, and a group is 32 channels of one token. Recent entries stay in full precision: keys until 128 of them are quantised
together, values until they are the 129th. Keys are stored rotated, and a step attends before anything it made due is
quantised. That is the authors' schedule and arithmetic. Any method may be stored so: `--quant_method kivi`.

The authors pack levels along tokens into 32-bit words; here they are packed along channels into bytes, so that a method that
evicts while decoding lets go of single entries and what stays is not quantised twice. Their scales have the model's type
(`scale_dtype=model`); here they have 16 bits in float32 too. 3 and 8 bits work as 2 and 4. KVCache-Factory's `kivi` is
another quantiser, HQQ's. The paper's group is 32, their scripts' 128.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfactory import hookimpl
from kvfactory.hookspecs import RegisterMethod, RegisterQuantisation
from kvfactory.quantisation import WindowedQuantisation

from .fullkv import FullKV


@dataclass(frozen=True, kw_only=True)
class KIVI(WindowedQuantisation):
    """Asymmetric uniform quantisation, per channel for keys and per token for values."""


@dataclass(frozen=True, kw_only=True)
class FullInKIVI(FullKV):
    """Every token, stored so."""


@hookimpl
def kvfactory_register_quantisations(register: RegisterQuantisation) -> None:
    register("kivi", KIVI)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("kivi", attention=FullInKIVI, quant_method="kivi")
