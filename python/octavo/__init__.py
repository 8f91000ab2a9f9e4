# SPDX-License-Identifier: Apache-2.0
"""Octavo quantizes PyTorch models for CPUs. `octavo.quantize_(model, octavo.Int8Dynamic())` is the whole of it.

This file lists the public names, and only them.
"""

from importlib.metadata import version as _version

import torch as _torch  # first: it loads the libtorch_cpu.so that octavo._C is linked to

from . import (
    activations,
    dtypes,
    evaluation,
    formats,
    methods,
    metrics,
    nn,
    numpy,
    observers,
    ops,
    reference,
    schemes,
)
from .conversion.convert import quantize_, quantized
from .conversion.prepare import calibrating, freeze_, prepare_
from .evaluation import Evaluation, Prompts
from .evaluation.comparison import compare
from .evaluation.evaluator import evaluate
from .evaluation.mixed_precision import choose
from .evaluation.sensitivities import Sensitivity, sensitivity
from .files import CheckpointContents, inspect_checkpoint, load, save
from .fusion import FusionReport, fuse_, unfuse_
from .methods import RoundToNearest, SmoothQuant
from .methods.bias_correction import correct_bias_
from .methods.equalization import equalize_
from .ops import int8_mm
from .runtime.cpu import cpu_info, use_isa
from .runtime.malloc import keep_memory
from .schemes.int8_dynamic import Int8Dynamic
from .schemes.int8_static import Int8Static
from .schemes.int8_weight_only import Int8WeightOnly
from .schemes.llm_int8 import LLMInt8
from .tensors.qparams import (
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

__version__ = _version("octavo")

__all__ = [
    "CheckpointContents",
    "Evaluation",
    "FusionReport",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "LLMInt8",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Prompts",
    "QParams",
    "QuantizedTensor",
    "RoundToNearest",
    "Sensitivity",
    "SmoothQuant",
    "__version__",
    "activations",
    "calibrating",
    "choose",
    "choose_qparams",
    "compare",
    "correct_bias_",
    "cpu_info",
    "dequantize",
    "dtypes",
    "equalize_",
    "evaluate",
    "evaluation",
    "formats",
    "freeze_",
    "fuse_",
    "inspect_checkpoint",
    "int8_mm",
    "keep_memory",
    "load",
    "methods",
    "metrics",
    "nn",
    "numpy",
    "observers",
    "ops",
    "prepare_",
    "quantize",
    "quantize_",
    "quantized",
    "reference",
    "save",
    "schemes",
    "sensitivity",
    "unfuse_",
    "use_isa",
]
