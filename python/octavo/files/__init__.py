# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk, one file for each format, and what all of them read and write with."""
