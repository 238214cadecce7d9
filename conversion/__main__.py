"""`python -m vispruner.conversion` is the command `vispruner`."""

import sys

from .cli import main

sys.exit(main())
