# SPDX-License-Identifier: Apache-2.0
"""The parts of `octavo.evaluate`: kinds of models, generation, resources, the result and how it is shown."""

from .comparison_result import OutputFigures
from .generation import Generation, Prompts, evaluate_generation, generate
from .kinds import KINDS, windows
from .resources import Memory, ModelResources, Resources, bits_per_weight, bytes_on_disk, memory_of
from .result import Evaluation

__all__ = [
    "KINDS",
    "Evaluation",
    "Generation",
    "Memory",
    "ModelResources",
    "OutputFigures",
    "Prompts",
    "Resources",
    "bits_per_weight",
    "bytes_on_disk",
    "evaluate_generation",
    "generate",
    "memory_of",
    "windows",
]
