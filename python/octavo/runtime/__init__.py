# SPDX-License-Identifier: Apache-2.0
"""What concerns the machine: the active instruction set, malloc, huge pages, and how times are measured."""
