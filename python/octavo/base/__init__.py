# SPDX-License-Identifier: Apache-2.0
"""What knows torch only: batches, configs, modules and how they change places, tables, progress."""
