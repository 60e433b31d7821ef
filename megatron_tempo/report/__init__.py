"""Reports on runs: html.py writes a report, summary.py a table for the terminal, plots.py the pictures."""
