# SPDX-License-Identifier: Apache-2.0
"""How one layer of a KVCache keeps keys and values: as floats in growing rooms, or as codes; and caches on disk."""
