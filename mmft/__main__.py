"""`python -m mmft`, and `accelerate launch -m mmft`."""

import sys

from mmft.cli import main

if __name__ == "__main__":
    sys.exit(main())
