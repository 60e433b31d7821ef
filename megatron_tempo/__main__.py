"""`python -m megatron_tempo`, for torchrun."""

import sys

from megatron_tempo.cli import main

if __name__ == "__main__":
    sys.exit(main())
