# SPDX-License-Identifier: Apache-2.0
"""Adapters on whole models: put on and taken off, switched, trained, saved, and merged into the quantized weights."""
