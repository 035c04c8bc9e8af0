"""`python -m jasper_fast`: the same as the `jasper-fast` command."""

import sys

from jasper_fast.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
