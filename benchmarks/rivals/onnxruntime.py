# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's dynamic int8: one scale for the whole input, weights with one scale, or with one for each channel.

Input and output are views of torch's and NumPy's memory: nothing is copied.
"""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("onnxruntime", "onnx")


def save_graph(linear: nn.Linear, path: Path) -> None:
    """y = x @ weight + bias as an ONNX graph."""
    from onnx import TensorProto, helper, numpy_helper, save

    weight, bias = (
        linear.weight.detach().float().t().contiguous().numpy(),
        linear.bias.detach().float().numpy(),
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", linear.in_features])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", linear.out_features])
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    graph = helper.make_graph(nodes, "linear", [x], [y], constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def build(linear: nn.Linear, per_channel: bool) -> Run:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing that one MatMul does not need
    with tempfile.TemporaryDirectory() as folder:
        path, quantized = Path(folder, "linear.onnx"), Path(folder, "int8.onnx")
        save_graph(linear, path)
        quantize_dynamic(path, quantized, weight_type=QuantType.QInt8, per_channel=per_channel)
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


RIVALS = [
    Rival("onnxruntime dynamic", partial(build, per_channel=False), False),
    Rival("onnxruntime dynamic per channel", partial(build, per_channel=True), False),
]
