"""What a configuration will need: memory of a GPU and time by phase, and the layouts that fit. Nothing is run.

Neither torch nor Megatron is loaded: `megatron-tempo plan` answers on a login node in about a second. Memory is in
bytes, GB are 10^9 of them.
"""
