"""What came out of a run: a report in HTML, a table for the terminal, a picture of the scores."""

from megatron_tempo.report.html import write_report
from megatron_tempo.report.plots import plot_curves
from megatron_tempo.report.summary import summary_table

__all__ = ["plot_curves", "summary_table", "write_report"]
