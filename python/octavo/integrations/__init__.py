# SPDX-License-Identifier: Apache-2.0
"""What other packages need to know of octavo's layers, one file for each package; imported on request."""
