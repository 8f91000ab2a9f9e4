# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's dynamic int8: one scale for the whole input, weights with one scale, or with one for each channel; and
MatMulNBits, symmetric weights in groups, with activations of 8 bits in groups ("accuracy level 4").

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
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing that one MatMul does not need
    with tempfile.TemporaryDirectory() as folder:
        path, quantized = Path(folder, "linear.onnx"), Path(folder, "int8.onnx")
        save_graph(linear, path)
        quantize_dynamic(path, quantized, weight_type=QuantType.QInt8, per_channel=per_channel)
        return session_of(quantized)


def groups(linear: nn.Linear, bits: int, group_size: int) -> Run:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "linear.onnx")
        save_graph(linear, path)
        quantizer = MatMulNBitsQuantizer(
            onnx.load(path), bits, group_size, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
        return session_of(quantizer.model.model.SerializeToString())


def session_of(model: Path | bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


RIVALS = [
    Rival("onnxruntime dynamic", partial(build, per_channel=False), False),
    Rival("onnxruntime dynamic per channel", partial(build, per_channel=True), False),
]
# MatMulNBits needs the package onnx-ir to be made.
LOW_BITS = [
    *RIVALS,
    Rival("onnxruntime int8 g32", partial(groups, bits=8, group_size=32), False),
    Rival("onnxruntime int4 g32", partial(groups, bits=4, group_size=32), False),
    Rival("onnxruntime int4 g128", partial(groups, bits=4, group_size=128), False),
]
