"""`python -m demo`, as `make demo` runs it."""

from __future__ import annotations

import signal
import sys

try:
    from demo.show import main
except ModuleNotFoundError as error:
    sys.exit(f"demo: {error}; `make demo` runs it with all that it needs")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it tidies up then as after control-C
    sys.exit(main())
