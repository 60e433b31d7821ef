"""What runs inside a sandbox, next to a program that is judged. It imports nothing of the rest of the package.

The folder is appended to the path of a bare interpreter (`megatron_tempo.rewards.sandbox`), so imports here are
relative.
"""
