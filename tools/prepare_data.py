"""The same as `megatron-tempo prepare`: python tools/prepare_data.py math500 MATH-500/ --out math500.jsonl"""

from __future__ import annotations

import sys

from megatron_tempo.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
