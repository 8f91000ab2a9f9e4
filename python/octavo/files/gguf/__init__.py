# SPDX-License-Identifier: Apache-2.0
"""GGUF, the files of llama.cpp: metadata, a vocabulary and tensors of blocks in a single file, or in numbered parts."""
