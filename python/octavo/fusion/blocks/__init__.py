# SPDX-License-Identifier: Apache-2.0
"""Repeated blocks as short lists of operators: exported, brought into a normal form, matched."""
