# SPDX-License-Identifier: Apache-2.0
"""ggml, the library of llama.cpp, as the package llama-cpp-python carries it: one product of matrices for each call.

A weight lies in the buffer that ggml's CPU backend likes best for its type ("repacked" where it has such a layout).
Input and output are copied, which costs 1 to 2 % at 256 rows and less below.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("llama_cpp",)
F32 = 0
TYPES = {"q4_0": 2, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12}  # ggml.h
REPACKED = b"CPU_REPACK"


class _Parameters(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_Parameters]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
}


class Library:
    """The C functions, by name, and a backend."""

    def __init__(self) -> None:
        spec = find_spec("llama_cpp")
        assert spec is not None and spec.submodule_search_locations is not None  # it is in REQUIRES
        folder = Path(spec.submodule_search_locations[0], "lib")
        libraries = [
            ctypes.CDLL(str(folder / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL)
            for part in ("base", "cpu")
        ]
        for name, (result, arguments) in SIGNATURES.items():
            function = next(getattr(each, name) for each in libraries if hasattr(each, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.backend = self.ggml_backend_cpu_init()
        self.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        self.plain = self.ggml_backend_cpu_buffer_type()

    def __getattr__(self, name: str) -> Any:  # for type checkers: all are set above
        raise AttributeError(name)

    def context(self) -> Any:
        return self.ggml_init(_Parameters(1 << 20, None, True))

    def repacked(self) -> Any:
        """The buffer type for weights that are laid out anew, if the library has one."""
        registry = self.ggml_backend_cpu_reg()
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)
        found = kinds(self.ggml_backend_reg_dev_get(registry, 0))
        for i in range(8):
            if not found[i]:
                return None
            if self.ggml_backend_buft_name(found[i]) == REPACKED:
                return found[i]
        return None


@cache
def library() -> Library:
    return Library()


def build(linear: nn.Linear, kind: str, repacked: bool = False) -> Run:
    lib, code = library(), TYPES[kind]
    n, k = linear.out_features, linear.in_features
    weight = linear.weight.detach().float().contiguous()
    blocks = torch.empty(n * lib.ggml_row_size(code, k), dtype=torch.uint8)
    floats = ctypes.cast(weight.data_ptr(), POINTER(c_float))
    lib.ggml_quantize_chunk(code, floats, blocks.data_ptr(), 0, n, k, None)
    context = lib.context()
    tensor = lib.ggml_new_tensor_2d(context, code, k, n)
    place = lib.repacked() if repacked else lib.plain
    if not place or not lib.ggml_backend_alloc_ctx_tensors_from_buft(context, place):
        raise RuntimeError(f"ggml has no such buffer for {kind}")
    lib.ggml_backend_tensor_set(tensor, blocks.data_ptr(), 0, len(blocks))
    bias = linear.bias.detach().float()

    @cache
    def graph(rows: int) -> tuple[Any, Any, Any]:
        inner = lib.context()
        x = lib.ggml_new_tensor_2d(inner, F32, k, rows)
        y = lib.ggml_mul_mat(inner, tensor, x)
        steps = lib.ggml_new_graph(inner)
        lib.ggml_build_forward_expand(steps, y)
        lib.ggml_backend_alloc_ctx_tensors_from_buft(inner, lib.plain)
        return steps, x, y

    def run(x: torch.Tensor) -> torch.Tensor:
        steps, into, out = graph(len(x))
        y = torch.empty(len(x), n)
        lib.ggml_backend_tensor_set(into, x.contiguous().data_ptr(), 0, x.nbytes)
        lib.ggml_backend_graph_compute(lib.backend, steps)
        lib.ggml_backend_tensor_get(out, y.data_ptr(), 0, y.nbytes)
        return y.add_(bias)

    return run


LOW_BITS = [
    Rival("ggml q4_0, repacked", partial(build, kind="q4_0", repacked=True), False),
    Rival("ggml q4_k, repacked", partial(build, kind="q4_k", repacked=True), False),
    *(Rival(f"ggml {kind}", partial(build, kind=kind), False) for kind in ("q8_0", "q4_0", "q3_k", "q2_k")),
]
