# SPDX-License-Identifier: Apache-2.0
"""Every scheme on a small language model of bytes, and training through the rounding of few bits."""
