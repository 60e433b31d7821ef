"""Plot avg@k and pass@k of a run over its iterations: python tools/plot_scores.py RUN_DIR docs/quickstart.png"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_tempo.report.plots import plot_curves

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path, help="picture to write; its suffix sets the format")
    arguments = parser.parse_args()
    plot_curves(arguments.run_dir, arguments.out)
