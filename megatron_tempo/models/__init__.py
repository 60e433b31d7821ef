"""Megatron-Core: device backend, parallel groups, layer specs, packing, pipeline schedule, actor and critic."""
