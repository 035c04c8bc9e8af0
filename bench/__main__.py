"""`python -m bench`, or `python -m jasper_fast.bench` where the package is installed."""

import os
import sys

try:
    from jasper_fast.bench.cli import shell

    status = shell()
except KeyboardInterrupt:  # during the imports, which take seconds
    status = 130
    if os.environ.get("RANK", "0") == "0":  # one message is enough if torchrun started several processes
        print("interrupted: nothing was measured yet", file=sys.stderr)
raise SystemExit(status)
