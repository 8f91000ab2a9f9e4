# SPDX-License-Identifier: Apache-2.0
"""The machine: which instruction set runs, memory of malloc and on huge pages, and how time is taken."""
