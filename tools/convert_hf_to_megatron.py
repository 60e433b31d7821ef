"""The same as `megatron-tempo convert hf-to-megatron`: python tools/convert_hf_to_megatron.py /models/Qwen3-8B OUT"""

from __future__ import annotations

import sys

from megatron_tempo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
