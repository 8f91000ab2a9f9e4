# SPDX-License-Identifier: Apache-2.0
"""What Octavo knows of the models and folders of transformers."""
