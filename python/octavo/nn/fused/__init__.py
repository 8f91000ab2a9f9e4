# SPDX-License-Identifier: Apache-2.0
"""What fuse_ puts into models: modules and blocks that run fewer and larger operators."""
