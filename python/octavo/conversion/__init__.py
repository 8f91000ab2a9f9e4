# SPDX-License-Identifier: Apache-2.0
"""From a float model to a quantized one: which layers, in which steps, and what is reported."""
