# SPDX-License-Identifier: Apache-2.0
"""`python -m octavo.cli`: the command line without the installed script."""

import sys

from . import main

sys.exit(main())
