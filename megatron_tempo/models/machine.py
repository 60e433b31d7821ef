"""The hardware and software of this process, and what follows from it: the implementations of layers and optimizer."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER
from megatron.core.utils import get_te_version

from megatron_tempo.config.choices import Layers, Precision
from megatron_tempo.config.recipes import RECIPES, dotted
from megatron_tempo.config.rules.precision import Machine
from megatron_tempo.config.schema import Config
from megatron_tempo.models.fusions import Fused, fused

APEX_GRADIENTS = "fused_weight_gradient_mlp_cuda"  # the module that Megatron-Core's linear layers import


def machine_of(device: torch.device) -> Machine:
    """The GPU and the software of this process."""
    te = get_te_version().release if HAVE_TE else None
    if device.type != "cuda":
        return Machine("", None, None, te)
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    flash, apex = (importlib.util.find_spec(name) is not None for name in ("flash_attn", APEX_GRADIENTS))
    return Machine(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), cuda, te, flash, apex)


def chosen_layers(config: Config, machine: Machine) -> Layers:
    """The implementation of the layers. The config has passed the rules for this machine."""
    if config.model.layers is not Layers.auto:
        return config.model.layers
    fast = machine.capability is not None and config.run.precision is not Precision.fp32
    return Layers.transformer_engine if fast and machine.te is not None else Layers.local


def chosen_fusions(config: Config, machine: Machine) -> Fused:
    """The fused operations of the layers. The config has passed the rules for this machine."""
    return fused(config.model.fusions, chosen_layers(config, machine), machine)


def described(config: Config, machine: Machine) -> str:
    """A line for the log: the device, the implementation and precision of the layers, and Megatron-Core's optimizer."""
    where = f"{machine.gpu} (compute capability {dotted(machine.capability)})" if machine.capability else "CPU"
    layers = "Megatron-Core and torch"
    if chosen_layers(config, machine) is Layers.transformer_engine:
        assert machine.te is not None
        layers = f"Transformer Engine {dotted(machine.te)}"
    words = [f"device: {where}", f"layers: {layers}, {config.run.precision.name}"]
    if config.run.precision in RECIPES and config.model.num_bf16_layers_at_ends:
        words[-1] += f", except the first and the last {config.model.num_bf16_layers_at_ends} layers in bf16"
    words.append(f"fused: {chosen_fusions(config, machine)}")
    adam = "Transformer Engine's FusedAdam" if USING_TE_OPTIMIZER else "Apex's FusedAdam"
    return "; ".join([*words, f"optimizer: {'torch.optim.AdamW' if USING_PYTORCH_OPTIMIZER else adam}"])
