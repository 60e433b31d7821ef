"""Keeps distributed jobs sound: watchdog, stop requests, actions that raise on all ranks."""
