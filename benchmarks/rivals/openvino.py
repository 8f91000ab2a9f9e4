# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: int8 and int4 weights with activations quantized in groups of 32, and statically quantized by nncf.

Input and output are views of torch's and OpenVINO's memory: nothing is copied.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("openvino", "nncf")
os.environ.setdefault("NNCF_CI", "1")  # nncf would report its use over the network


def graph(linear: nn.Linear) -> object:
    """x @ weight.T + bias, an openvino.Model."""
    import openvino as ov
    from openvino import opset13 as ops

    weight, bias = linear.weight.detach().float().numpy(), linear.bias.detach().float().numpy()
    x = ops.parameter([-1, linear.in_features], ov.Type.f32)
    product = ops.matmul(x, ops.constant(weight), transpose_a=False, transpose_b=True)
    return ov.Model([ops.add(product, ops.constant(bias))], [x], "linear")


def request_of(model: object) -> Any:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return ov.Core().compile_model(model, "CPU", settings).create_infer_request()


def compiled(model: object) -> Run:
    request = request_of(model)
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


def dynamic(linear: nn.Linear) -> Run:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return compiled(nncf.compress_weights(graph(linear), mode=nncf.CompressWeightsMode.INT8_SYM))


def int4(linear: nn.Linear, group_size: int) -> Run:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    mode = nncf.CompressWeightsMode.INT4_SYM
    with contextlib.redirect_stdout(io.StringIO()):
        return compiled(
            nncf.compress_weights(graph(linear), mode=mode, group_size=group_size, all_layers=True)
        )


def static(linear: nn.Linear) -> Run:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    samples = nncf.Dataset([torch.randn(256, linear.in_features).numpy()])
    with contextlib.redirect_stdout(io.StringIO()):
        return compiled(nncf.quantize(graph(linear), samples, subset_size=1))


def static_model(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """A whole model, traced and statically quantized as nncf recommends for transformers, calibrated on `batches`:
    a function of the same keyword arguments that returns the first output."""
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    samples = nncf.Dataset([{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches])
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit.trace
        traced = ov.convert_model(model, example_input=batches[0])
        kind = nncf.ModelType.TRANSFORMER
        request = request_of(nncf.quantize(traced, samples, model_type=kind, subset_size=len(batches)))

    def run(**batch: torch.Tensor) -> torch.Tensor:
        inputs = {name: tensor.numpy() for name, tensor in batch.items()}
        return torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])

    return run


RIVALS = [
    Rival("openvino int8 weights", dynamic, True),
    Rival("openvino static", static, False),
]
LOW_BITS = [
    Rival("openvino int8 weights", dynamic, True),
    Rival("openvino int4 g32", partial(int4, group_size=32), False),
    Rival("openvino int4 g128", partial(int4, group_size=128), False),
]
