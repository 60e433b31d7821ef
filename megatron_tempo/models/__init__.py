"""Megatron-Core models: device backend, process groups, layer specs, packing, pipeline schedule, actor and critic."""
