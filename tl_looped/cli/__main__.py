"""`python -m tl_looped.cli` is `tl-looped`."""

from __future__ import annotations

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
