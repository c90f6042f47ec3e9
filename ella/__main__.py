"""`python -m ella`."""

import sys

from ella.command import main

if __name__ == "__main__":
    sys.exit(main())
