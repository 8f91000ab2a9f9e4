# SPDX-License-Identifier: Apache-2.0
"""Octavo quantizes PyTorch models for CPUs. `octavo.quantize_(model, octavo.Int8Dynamic())` is the whole of it.

This file lists the public names, and only them.
"""

from importlib.metadata import version as _version

import torch as _torch  # first: it loads the libtorch_cpu.so that octavo._C is linked to

from . import dtypes, evaluation, metrics, nn, numpy, ops, reference, schemes
from .checkpoint import load, save
from .compare import compare
from .convert import quantize_, quantized
from .cpu import cpu_info, use_isa
from .evaluate import evaluate
from .evaluation import Evaluation, Prompts
from .inspection import CheckpointContents, inspect_checkpoint
from .malloc import keep_memory
from .ops import int8_mm
from .qparams import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QParams,
    QuantizedTensor,
    choose_qparams,
    dequantize,
    quantize,
)
from .schemes.int8_dynamic import Int8Dynamic
from .schemes.int8_weight_only import Int8WeightOnly

__version__ = _version("octavo")

__all__ = [
    "CheckpointContents",
    "Evaluation",
    "Int8Dynamic",
    "Int8WeightOnly",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Prompts",
    "QParams",
    "QuantizedTensor",
    "__version__",
    "choose_qparams",
    "compare",
    "cpu_info",
    "dequantize",
    "dtypes",
    "evaluate",
    "evaluation",
    "inspect_checkpoint",
    "int8_mm",
    "keep_memory",
    "load",
    "metrics",
    "nn",
    "numpy",
    "ops",
    "quantize",
    "quantize_",
    "quantized",
    "reference",
    "save",
    "schemes",
    "use_isa",
]
