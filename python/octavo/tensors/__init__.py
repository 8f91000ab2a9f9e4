# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors: granularities, scales and zero points, fake quantization, and a picture of one."""
