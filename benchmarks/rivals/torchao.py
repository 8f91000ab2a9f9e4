# SPDX-License-Identifier: Apache-2.0
"""torchao's int8 layers, eager and compiled, and its int4 for CPUs, torch's own kernel behind a tensor class.

torch.compile freezes weights only if the global torch._inductor.config.freezing is set: its option of that name does
not reach dynamo (torch 2.13), and then the weight is summed again in each call. A compiled layer serves one batch size.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from . import Rival, Run

REQUIRES = ("torchao",)


def dynamic(linear: nn.Linear) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(deepcopy(linear))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return model[0]


def weight_only(linear: nn.Linear) -> Run:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(deepcopy(linear))
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    return model[0]


def int4(linear: nn.Linear) -> Run:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = nn.Sequential(deepcopy(linear))
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    return model[0]


def compiled(linear: nn.Linear) -> Run:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._dynamo.reset()  # else the eighth shape falls back to eager
    return torch.compile(dynamic(linear), dynamic=False)


BOTH = (torch.float32, torch.bfloat16)
RIVALS = [
    Rival("torchao dynamic", dynamic, True, BOTH),
    Rival("torchao dynamic, compiled", compiled, True, batches=(1, 16, 256)),
    Rival("torchao weight-only", weight_only, True, BOTH),
]
LOW_BITS = [Rival("torchao int4 g32", int4, False)]
