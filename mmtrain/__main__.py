"""`python -m mmtrain` is the command `mmtrain`."""

import sys

from mmtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
