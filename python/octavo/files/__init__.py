# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: one file for each format, what all of them read and write with, and the calls of users."""

from .bitsandbytes import BitsAndBytes
from .checkpoints import inspect_checkpoint, load, save
from .compressed_tensors import CompressedTensors
from .format import FILE_FORMATS, Checkpoint, FileFormat, format_of, model_changed, recognizing
from .gguf import GGUF, load_gguf, load_imatrix, save_gguf, save_imatrix
from .inspection import HEADER, CheckpointContents
from .octavo import Octavo
from .safetensors import Safetensors

FILE_FORMATS += [
    Octavo(),
    CompressedTensors(),
    BitsAndBytes(),
    GGUF(),
    Safetensors(),
]  # the last takes every folder that transformers writes

__all__ = [
    "FILE_FORMATS",
    "HEADER",
    "Checkpoint",
    "CheckpointContents",
    "FileFormat",
    "format_of",
    "inspect_checkpoint",
    "load",
    "load_gguf",
    "load_imatrix",
    "model_changed",
    "recognizing",
    "save",
    "save_gguf",
    "save_imatrix",
]
