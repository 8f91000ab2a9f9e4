# SPDX-License-Identifier: Apache-2.0
"""What other packages need to know of octavo's layers. Each module imports the package that it is for."""
