# SPDX-License-Identifier: Apache-2.0
"""GGUF, the files of llama.cpp: metadata, a vocabulary and tensors of blocks in a single file, or in numbered parts."""

from .checkpoint import GGUF, Origin
from .imatrix import load_imatrix, save_imatrix
from .opening import load_gguf
from .saving import save_gguf

__all__ = ["GGUF", "Origin", "load_gguf", "load_imatrix", "save_gguf", "save_imatrix"]
