"""The second task of the study: boolean expressions and dates (tools/make_logic_dates.py)."""
