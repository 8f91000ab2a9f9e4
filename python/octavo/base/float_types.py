# SPDX-License-Identifier: Apache-2.0
"""The floating-point dtypes that layers and operators read and write."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
