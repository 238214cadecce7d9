"""`python -m vispruner` is the command `vispruner`. Like `__init__.py`, this file is never published."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.exit(import_module("vispruner.conversion.cli").main())
