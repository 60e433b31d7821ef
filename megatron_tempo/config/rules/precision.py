"""Rules on precision: what Transformer Engine and its FP8 recipes require of model, layout, GPU and software.

Before a job is queued, only the cluster's preset names the GPU, if one is given. Where a job starts, the GPU itself is
checked (`check_machine`). Both use the table of `config/recipes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tempo.config.choices import Layers, Precision
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.recipes import (
    BF16_CAPABILITY,
    GPUS,
    RECIPES,
    TE_VERSION,
    Recipe,
    Version,
    dotted,
    runs_on,
    wanted_gpu,
)
from megatron_tempo.config.rules.layout import Laid, divisors, folders_of, laid_of
from megatron_tempo.config.schema import Config
from megatron_tempo.config.sizes import expert_cut

_CUDNN_CAPABILITY, _BLACKWELL = (9, 0), (10, 0)
_UNSHARED = f"run.precision={Precision.fp8_tensorwise.name}"  # scales are those of the tensor itself


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and software of a process.

    >>> Machine(gpu="NVIDIA H100 80GB HBM3", capability=(9, 0), cuda=(13, 0), te=(2, 11, 0))
    """

    gpu: str
    capability: Version | None  # of the GPU; None if there is none
    cuda: Version | None  # that torch is built with
    te: Version | None  # of Transformer Engine; None if it is not installed or Megatron-Core cannot import it
    flash_attn: bool = False  # whether flash-attn is installed
    apex_gradients: bool = False  # whether Apex's kernel for weight gradients is installed


def check(config: Config, shapes: dict[str, ModelShape]) -> Iterator[Problem]:
    """Problems that are known before the job starts, including those of the cluster's GPU."""
    precision, recipe = config.run.precision, RECIPES.get(config.run.precision)
    if recipe is not None and config.model.layers is Layers.local:
        wrong = f"run.precision={precision.name} is Transformer Engine's"
        yield Problem("model.layers", Layers.local, wrong, "model.layers=auto, or run.precision=bf16")
    if config.model.layers is Layers.transformer_engine and precision is Precision.fp32:
        wrong = "Transformer Engine's fast attentions are for bf16"
        yield Problem("model.layers", config.model.layers, wrong, "run.precision=bf16, or model.layers=auto")
    yield from _ends(config)
    yield from _maxima(config)
    problems: list[Problem] = []
    for role, folder in folders_of(config).items():
        if recipe is not None and folder in shapes:
            laid = laid_of(config, role)
            problems += _ends_of(config, laid, folder, shapes[folder])
            problems += _sizes(config, recipe, laid, folder, shapes[folder])
    yield from dict.fromkeys(problems)  # a critic with the actor's folder and layout has the same problems
    if config.cluster is not None and config.cluster.gpu in GPUS:
        yield from _gpu(precision, config.cluster.gpu, GPUS[config.cluster.gpu])


def check_machine(config: Config, machine: Machine) -> Iterator[Problem]:
    """Problems of the machine on which a job starts."""
    precision, layers = config.run.precision, config.model.layers
    recipe = RECIPES.get(precision)
    yield from _attention(config, machine)
    if machine.capability is None and precision is not Precision.fp32:
        yield Problem("run.precision", precision, "requires a GPU, and there is none", "run.precision=fp32")
        return
    if machine.capability is not None:
        yield from _gpu(precision, machine.gpu, machine.capability)
    if recipe is not None and recipe.cuda is not None and (machine.cuda or ()) < recipe.cuda:
        wrong = f"requires torch built with CUDA {dotted(recipe.cuda)} or later, not {dotted(machine.cuda or ())}"
        yield Problem("run.precision", precision, wrong, _other(precision, machine))
    if recipe is None and layers is not Layers.transformer_engine:
        return
    field, value = ("run.precision", precision) if recipe is not None else ("model.layers", layers)
    wanted = recipe.te if recipe is not None else TE_VERSION
    if machine.te is None:
        wrong = "requires Transformer Engine, which is not installed or cannot be imported by Megatron-Core"
        fix = "install the package's extra te, or a container that has it (docs/gpu.md); or "
        yield Problem(field, value, wrong, fix + ("run.precision=bf16" if recipe is not None else "model.layers=auto"))
    elif machine.te < wanted:
        wrong = f"requires Transformer Engine {dotted(wanted)} or later, and {dotted(machine.te)} is installed"
        yield Problem(field, value, wrong, f"install {dotted(wanted)} or later, or {field}=another")


def _attention(config: Config, machine: Machine) -> Iterator[Problem]:
    """Where TE would use its unfused attention, whose scores take the square of a row's tokens.

    By `get_attention_backend` of TE 2.11 (pytorch/attention/dot_product_attention/utils.py), for packed sequences in
    bf16 without flash-attn: cuDNN's attention requires Hopper, and on Blackwell its backward pass is not deterministic.
    The real choice was read for each of these GPUs on the null GPU (tests/nullgpu/test_numerics.py).
    """
    layers, precision, capability = config.model.layers, config.run.precision, machine.capability
    uses_te = layers is Layers.transformer_engine or (layers is Layers.auto and precision is not Precision.fp32)
    ours = min(config.parallel.context, config.parallel.of_critic().context) > 1  # the attention is not TE's
    if capability is None or machine.te is None or machine.flash_attn or not uses_te or ours:
        return
    local = "model.layers=local" if precision not in RECIPES else "run.precision=bf16 with model.layers=local"
    wrong = f"Transformer Engine needs flash-attn on {machine.gpu}, and would keep the scores of all pairs of tokens"
    if capability < _CUDNN_CAPABILITY:
        yield Problem("model.layers", layers, wrong, f"install flash-attn, or {local}")
    elif capability >= _BLACKWELL and config.run.deterministic:
        wrong += " in a deterministic step"
        yield Problem("model.layers", layers, wrong, f"run.deterministic=false, or install flash-attn, or {local}")


def _ends(config: Config) -> Iterator[Problem]:
    ends, precision = config.model.num_bf16_layers_at_ends, config.run.precision
    if ends > 0 and precision not in RECIPES:
        wrong = f"with run.precision={precision.name} there is no FP8 to keep layers from"
        yield Problem(
            "model.num_bf16_layers_at_ends",
            ends,
            wrong,
            "model.num_bf16_layers_at_ends=0, or run.precision=fp8_tensorwise",
        )
    if ends > 0 and precision is Precision.fp8_delayed:
        wrong = "delayed scaling follows the whole model's magnitudes: Megatron-Core cannot leave layers out of it"
        yield Problem(
            "model.num_bf16_layers_at_ends",
            ends,
            wrong,
            "model.num_bf16_layers_at_ends=0, or run.precision=fp8_tensorwise",
        )


def _maxima(config: Config) -> Iterator[Problem]:
    """Actor and critic must share the ranks over which delayed scaling reduces the largest magnitudes.

    At the end of each pass, Transformer Engine reduces those of all models of the process, each over the group of its
    own layout (`reduce_and_update_fp8_tensors` of its pytorch/quantization.py). If the ranks of one model's group
    belong to different replicas of the other, they make different numbers of passes: one waits for ever.
    """
    actor, critic = config.parallel, config.parallel.of_critic()
    if config.run.precision is not Precision.fp8_delayed:
        return
    if actor.tensor * actor.context != critic.tensor * critic.context:
        changed = [name for name in ("tensor", "context") if getattr(actor, name) != getattr(critic, name)]
        wrong = (
            "fp8_delayed shares scales over tensor * context ranks, which must be as many for the critic as the actor"
        )
        fix = " ".join(f"parallel.critic.{name}=null" for name in changed)
        yield Problem(f"parallel.critic.{changed[0]}", getattr(critic, changed[0]), wrong, f"{fix}, or {_UNSHARED}")


def _ends_of(config: Config, laid: Laid, folder: str, shape: ModelShape) -> Iterator[Problem]:
    layers, ends = shape.layers, config.model.num_bf16_layers_at_ends
    most = min((layers - 1) // 2, layers // max(1, laid.parallel.pipeline))
    if ends > most:
        wrong = f"{folder} has {layers} layers: one must be left for FP8, and either end lies in one pipeline stage"
        yield Problem("model.num_bf16_layers_at_ends", ends, wrong, f"model.num_bf16_layers_at_ends={most} or less")


def _sizes(config: Config, recipe: Recipe, laid: Laid, folder: str, shape: ModelShape) -> Iterator[Problem]:
    """The inputs and outputs of a layer's four linear maps, on one tensor rank."""
    tensor = max(1, laid.parallel.tensor)
    queries, keys = (n * shape.head_dim for n in (shape.heads, shape.groups))
    cut = {
        "queries": queries,
        "queries, keys and values": queries + 2 * keys,
    }
    sizes = {"the hidden size": shape.hidden}
    if shape.experts is None:
        cut["feed-forward units"] = shape.ffn
    else:
        sizes["the feed-forward units of an expert on a rank"] = shape.experts.ffn // max(1, laid.parallel.expert_cut)
    sizes |= {f"the {name} of a tensor rank": size // tensor for name, size in cut.items() if size % tensor == 0}
    uneven = [f"{name} ({size})" for name, size in sizes.items() if size % recipe.multiple]
    if not uneven:
        return

    def even(tensor: int, multiple: int) -> bool:
        ranks = max(1, expert_cut(tensor, laid.parallel.expert_tensor))
        whole = [shape.hidden] if shape.experts is None else [shape.hidden, shape.experts.ffn // ranks]
        tensors = all(size % (tensor * multiple) == 0 for size in cut.values())
        return tensors and all(size % multiple == 0 for size in whole)

    smaller = [t for t in reversed(divisors(tensor)[:-1]) if even(t, recipe.multiple)]
    others = [other.name for other, needs in RECIPES.items() if even(tensor, needs.multiple)]
    fixes = [f"{laid.fields['tensor']}={smaller[0]}"] if smaller else []
    wrong = f"multiplies in multiples of {recipe.multiple}, which {' and '.join(uneven)} of {folder} are not"
    fix = " or ".join([*fixes, f"run.precision={' or '.join([*others, Precision.bf16.name])}"])
    yield Problem("run.precision", config.run.precision, wrong, fix)


def _gpu(precision: Precision, gpu: str, capability: Version) -> Iterator[Problem]:
    recipe = RECIPES.get(precision)
    if recipe is not None and not runs_on(recipe, capability):
        wrong = f"requires a GPU of {wanted_gpu(recipe)}, and {gpu} has {dotted(capability)}"
        possible = [other.name for other, needs in RECIPES.items() if runs_on(needs, capability)]
        plain = "bf16" if capability >= BF16_CAPABILITY else "fp32"
        yield Problem("run.precision", precision, wrong, f"run.precision={' or '.join([plain, *possible])}")
    if precision is not Precision.fp32 and recipe is None and capability < BF16_CAPABILITY:
        wrong = f"requires compute capability {dotted(BF16_CAPABILITY)} or more, and {gpu} has {dotted(capability)}"
        yield Problem("run.precision", precision, wrong, "run.precision=fp32")


def _other(precision: Precision, machine: Machine) -> str:
    assert machine.capability is not None
    possible = [
        other.name
        for other, needs in RECIPES.items()
        if other is not precision and needs.cuda is None and runs_on(needs, machine.capability)
    ]
    return f"run.precision={' or '.join(['bf16', *possible])}"
