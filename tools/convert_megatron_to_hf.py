"""The same as `megatron-tempo convert megatron-to-hf`: python tools/convert_megatron_to_hf.py CHECKPOINT OUT"""

from __future__ import annotations

import sys

from megatron_tempo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
