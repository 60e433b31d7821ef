"""Reliability of distributed jobs: watchdog, stop requests, actions that raise on all ranks."""
