"""Publish repos on the Hugging Face Hub, from a checkout: `vispruner publish` under another name."""

import sys

from vispruner.conversion.publish_command import main

if __name__ == "__main__":
    sys.exit(main())
