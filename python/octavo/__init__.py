# SPDX-License-Identifier: Apache-2.0
"""Octavo quantizes PyTorch models for CPUs. `octavo.quantize_(model, octavo.Int8Dynamic())` is the whole of it.

This file lists the public names, and only them. A name's module is imported when the name is first used, so that
`import octavo` loads the operators and little else.
"""

import difflib as _difflib
import importlib as _importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import torch as _torch  # first: it loads the libtorch_cpu.so that octavo._C is linked to

from . import ops  # at once: torch.ops.octavo belongs to what an exported program needs
from .ops import int8_mm

if _TYPE_CHECKING:  # what _HOMES does, for editors and type checkers
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
        reference,
        schemes,
    )
    from .adaptation.adapt import adapt_, adapters, remove_adapters_, use_adapters
    from .adaptation.loftq import loftq_
    from .adaptation.merge import merge_
    from .adaptation.peft_folder import load_adapter, save_adapter
    from .adaptation.rank_allocator import RankAllocator
    from .conversion.convert import quantize_, quantized
    from .conversion.prepare import calibrating, freeze_, prepare_
    from .evaluation import Evaluation, Prompts
    from .evaluation.comparison import compare
    from .evaluation.evaluator import evaluate
    from .evaluation.mixed_precision import choose
    from .evaluation.sensitivities import Sensitivity, sensitivity
    from .files import (
        CheckpointContents,
        inspect_checkpoint,
        load,
        load_gguf,
        load_imatrix,
        save,
        save_gguf,
        save_imatrix,
    )
    from .files.gguf.mean_squares import importance_matrix
    from .fusion import FusionReport, fuse_, unfuse_
    from .integrations.transformers import OctavoConfig
    from .methods import AWQ, GPTQ, HQQ, ClipSearch, RoundToNearest, SmoothQuant
    from .methods.bias_correction import correct_bias_
    from .methods.equalization import equalize_
    from .nn.adapters import IA3, AdaLoRA, LoRA
    from .runtime.cpu import cpu_info, use_isa
    from .runtime.malloc import keep_memory
    from .schemes.fp4 import FP4
    from .schemes.ggml import GGML
    from .schemes.half_weight_only import HalfWeightOnly
    from .schemes.int4_dynamic import Int4Dynamic
    from .schemes.int4_weight_only import Int4WeightOnly
    from .schemes.int8_dynamic import Int8Dynamic
    from .schemes.int8_static import Int8Static
    from .schemes.int8_weight_only import Int8WeightOnly
    from .schemes.llm_int8 import LLMInt8
    from .schemes.mxfp4 import MXFP4
    from .schemes.nf4 import NF4
    from .schemes.nvfp4 import NVFP4
    from .tensors.granularity import PerChannel, PerGroup, PerTensor, PerToken
    from .tensors.qparams import QParams, QuantizedTensor, choose_qparams, dequantize, quantize

# Each module of the package that defines public names, and these names.
_HOMES = {
    "adaptation.adapt": ["adapt_", "adapters", "remove_adapters_", "use_adapters"],
    "adaptation.loftq": ["loftq_"],
    "adaptation.merge": ["merge_"],
    "adaptation.peft_folder": ["load_adapter", "save_adapter"],
    "adaptation.rank_allocator": ["RankAllocator"],
    "conversion.convert": ["quantize_", "quantized"],
    "conversion.prepare": ["calibrating", "freeze_", "prepare_"],
    "evaluation": ["Evaluation", "Prompts"],
    "evaluation.comparison": ["compare"],
    "evaluation.evaluator": ["evaluate"],
    "evaluation.mixed_precision": ["choose"],
    "evaluation.sensitivities": ["Sensitivity", "sensitivity"],
    "files": [
        "CheckpointContents",
        "inspect_checkpoint",
        "load",
        "load_gguf",
        "load_imatrix",
        "save",
        "save_gguf",
        "save_imatrix",
    ],
    "fusion": ["FusionReport", "fuse_", "unfuse_"],
    "integrations.transformers": ["OctavoConfig"],
    "methods": ["AWQ", "ClipSearch", "GPTQ", "HQQ", "RoundToNearest", "SmoothQuant"],
    "methods.bias_correction": ["correct_bias_"],
    "methods.equalization": ["equalize_"],
    "nn.adapters": ["IA3", "AdaLoRA", "LoRA"],
    "files.gguf.mean_squares": ["importance_matrix"],
    "runtime.cpu": ["cpu_info", "use_isa"],
    "runtime.malloc": ["keep_memory"],
    "schemes.fp4": ["FP4"],
    "schemes.ggml": ["GGML"],
    "schemes.int4_dynamic": ["Int4Dynamic"],
    "schemes.int4_weight_only": ["Int4WeightOnly"],
    "schemes.int8_dynamic": ["Int8Dynamic"],
    "schemes.int8_static": ["Int8Static"],
    "schemes.half_weight_only": ["HalfWeightOnly"],
    "schemes.int8_weight_only": ["Int8WeightOnly"],
    "schemes.llm_int8": ["LLMInt8"],
    "schemes.mxfp4": ["MXFP4"],
    "schemes.nf4": ["NF4"],
    "schemes.nvfp4": ["NVFP4"],
    "tensors.granularity": ["PerChannel", "PerGroup", "PerTensor", "PerToken"],
    "tensors.qparams": ["QParams", "QuantizedTensor", "choose_qparams", "dequantize", "quantize"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = _version("octavo")

__all__ = [
    "AWQ",
    "FP4",
    "GGML",
    "GPTQ",
    "HQQ",
    "IA3",
    "MXFP4",
    "NF4",
    "NVFP4",
    "AdaLoRA",
    "CheckpointContents",
    "ClipSearch",
    "Evaluation",
    "FusionReport",
    "HalfWeightOnly",
    "Int4Dynamic",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "LLMInt8",
    "OctavoConfig",
    "LoRA",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Prompts",
    "QParams",
    "QuantizedTensor",
    "RankAllocator",
    "RoundToNearest",
    "Sensitivity",
    "SmoothQuant",
    "__version__",
    "activations",
    "adapt_",
    "adapters",
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
    "importance_matrix",
    "inspect_checkpoint",
    "int8_mm",
    "keep_memory",
    "load",
    "load_adapter",
    "loftq_",
    "merge_",
    "load_gguf",
    "load_imatrix",
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
    "remove_adapters_",
    "save",
    "save_adapter",
    "save_gguf",
    "save_imatrix",
    "schemes",
    "sensitivity",
    "unfuse_",
    "use_adapters",
    "use_isa",
]


def __getattr__(name: str) -> _Any:
    if name in _HOME_OF:
        value = getattr(_importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    elif name in __all__:
        value = _importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"octavo has no {name!r}{_hint(name)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


def _hint(name: str) -> str:
    lower = {public.lower(): public for public in __all__}
    near = _difflib.get_close_matches(name.lower(), lower, n=2)
    return f"; did you mean {' or '.join(f'octavo.{lower[match]}' for match in near)}?" if near else ""
