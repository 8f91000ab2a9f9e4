# SPDX-License-Identifier: Apache-2.0
"""The demo, the bench and the study: programs that show what the package does, and are no part of it."""
