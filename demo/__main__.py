"""`python -m demo`, as `make demo` runs it."""

from __future__ import annotations

import sys

try:
    from demo.show import main
except ModuleNotFoundError as error:
    sys.exit(f"demo: {error}; `make demo` runs it with all that it needs")

if __name__ == "__main__":
    sys.exit(main())
