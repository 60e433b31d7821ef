"""Bytes of activations: what autograd saves per layer, and what is allocated on top of it at the peak.

The accounting follows Korthikanti et al. 2022 (arXiv 2205.05198), section 4, redone for our layers: packed rows,
grouped queries, SwiGLU, norms in fp32, rotary embeddings, no dropout. Notation: S tokens of a
micro-batch, g cells of its attention grid, h hidden size, q and k widths of the query and the key projection, d head
size, f feed-forward width, t tensor-parallel ranks, a bytes per number. q, k and f are those of one rank, divided by t;
h means h / t under sequence parallelism for each tensor between the matrix products.

Of a mixture of experts, f is the width of all rows that a rank's experts compute, per token of the micro-batch: each
token is a row of each expert that it is sent to. If all experts had equally many rows, a rank would compute as many as
it sends; expert ranks are not balanced, and the fullest one counts (`IMBALANCE`). In the worst case all rows of the
expert ranks go to one of them. No layout is planned for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_tempo.config.choices import Recompute
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.pipeline_layers import micro_batch_group
from megatron_tempo.plan.layout import PlannedLayout, PlannedMachine, PlannedMicroBatch

# Rows of the fullest expert rank in a micro-batch, as a multiple of the mean. An assumption that no run has measured.
IMBALANCE = 1.5


@dataclass(frozen=True, slots=True)
class Widths:
    """A rank's share of the layer's widths, in numbers per token."""

    h: float  # between matrix products, divided under sequence parallelism
    full: float  # the whole hidden size
    q: float
    k: float
    f: float
    heads: float
    groups: float
    d: float
    sequence: bool
    rows: float = 0.0  # of a rank's experts, for each token; 0 without experts
    router: float = 0.0  # experts among which a token's router chooses, divided under sequence parallelism
    weight: float = 0.0  # numbers of the second matrix of the feed-forward part, or of an expert

    @classmethod
    def of(cls, shape: ModelShape, layout: PlannedLayout) -> Widths:
        t, sequence = layout.tensor, layout.sequence and layout.tensor > 1
        divided, own, cut = t if sequence else 1, shape.experts, layout.expert_cut
        rows = own.per_token * cut / divided * (IMBALANCE if layout.expert > 1 else 1) if own else 0.0
        inner = shape.ffn / t if own is None else own.ffn / cut
        return cls(
            shape.hidden / divided,
            shape.hidden,
            shape.queries / t,
            shape.keys / t,
            inner * (rows if own else 1),
            shape.heads / t,
            shape.groups / t,
            shape.head_dim,
            sequence,
            rows,
            own.count / divided if own else 0.0,
            inner * shape.hidden,
        )


def norm(w: Widths, machine: PlannedMachine) -> float:
    """What one norm of the hidden states and the matrix product after it save, in bytes per token.

    The input in fp32 (the residual stream itself if it is fp32, else a copy), 4 h; the reciprocal root, 4; the output,
    which the matrix product saves, a h. On a CPU, torch's rms_norm consists of single operations and also saves the
    normed input, 4 h.
    """
    return (4 + machine.size + (0 if machine.cuda else 4)) * w.h + 4


def attention(w: Widths, machine: PlannedMachine, micro: PlannedMicroBatch) -> float:
    """What the attention saves between its norm and its output, in bytes.

    Norms of queries and keys: in bf16, fp32 copies, 4 (q + k). In fp32, the joint projection q + 2 k, of which the keys
    are a view, and a copy of its queries, q, if the rank has several groups (with one group they are a view too); on a
    CPU also both after their norms. Reciprocal roots: 4 per head and group. What rotates is the pass's own (`turns`).
    The output by token, which the projection saves: a q.
    """
    a = machine.size
    if machine.mixed:
        norms = 4 * (w.q + w.k)
    else:
        norms = a * (w.q + 2 * w.k + (w.q if w.groups > 1 else 0) + (0 if machine.cuda else w.q + w.k))
    return (norms + 4 * (w.heads + w.groups) + a * w.q) * micro.tokens


def turns(w: Widths, machine: PlannedMachine) -> float:
    """What a pass's layers rotate queries and keys by, in bytes per token: a cosine and a sine per number of a head,
    2 a d, or angles in fp32 where Transformer Engine rotates."""
    return (4 if machine.fused else 2 * machine.size) * w.d


def on_grid(w: Widths, machine: PlannedMachine, layout: PlannedLayout, micro: PlannedMicroBatch, kv: float) -> float:
    """What the attention kernel saves, in bytes. `kv`: the width of the keys that the kernel reads (`kernel_keys`).

    On the grid: queries and the output, 2 a q, keys and values, 2 a kv, and log-sum-exps, 4 per head. Rows of one
    length need no copies of queries and the output; a full micro-batch can always be of rows of different lengths.
    Over c context ranks there is no grid: a rank's queries and outputs by token, 2 a q, and keys and values of all
    ranks' tokens, 2 a kv.
    """
    a, S = machine.size, micro.tokens
    if layout.context > 1:
        return (2 * a * w.q + 4 * w.heads) * S + 2 * a * kv * S * layout.context
    return (2 * a * (w.q + kv) + 4 * w.heads) * micro.grid


def kernel_keys(w: Widths, shape: ModelShape, machine: PlannedMachine) -> float:
    """The width of the keys that the attention kernel reads in training. torch's flash attention takes grouped queries:
    on CUDA, in bf16, without a window. Otherwise keys are repeated to the number of query heads."""
    grouped = machine.cuda and machine.mixed and not shape.windowed_layers
    return w.k if grouped else w.q


def feed_forward(w: Widths, machine: PlannedMachine) -> float:
    """What the feed-forward part saves, in bytes per token: both halves of the first product, 2 f, and the input of the
    second product, f. Without `one_swiglu` also silu of the gate, f, and the other half again, f, because Megatron adds
    an offset of 0. With experts also `mixture`."""
    return (3 if machine.one_swiglu else 5) * machine.size * w.f + mixture(w, machine)


def mixture(w: Widths, machine: PlannedMachine) -> float:
    """What a mixture of experts saves beyond the products of its experts, in bytes per token: 0 without experts.

    The router's scores and probabilities in fp32, and which experts are chosen: 9 per expert. Each row that the rank's
    experts compute: the state that their first product saves, a h, its probability, 4, and its place, 8.
    """
    return 9 * w.router + (machine.size * w.full + 12) * w.rows


def layer(shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, micro: PlannedMicroBatch) -> float:
    """All that one layer saves for its backward pass, in bytes. With `Recompute.attention`, the inputs of the attention
    kernel instead of what the kernel saves: rotated queries and keys, and values, which are a view of the joint
    projection, q + 2 k. In fp32 the norms save that too."""
    w = Widths.of(shape, layout)
    joint = w.q + 2 * w.k if machine.mixed else 0
    given = machine.size * (w.q + w.k + joint) * micro.tokens
    read = kernel_keys(w, shape, machine)
    inside = given if layout.recompute is Recompute.attention else on_grid(w, machine, layout, micro, read)
    by_token = 2 * norm(w, machine) + feed_forward(w, machine)
    return by_token * micro.tokens + attention(w, machine, micro) + inside


def whole_layer(shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, micro: PlannedMicroBatch) -> float:
    """What a layer saves when it is recomputed, in bytes."""
    return layer(shape, replace(layout, recompute=Recompute.none), machine, micro)


def kept(
    shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, micro: PlannedMicroBatch, stage: int
) -> float:
    """What the layers of a stage's chunk save for one micro-batch between its forward and its backward pass, in bytes.

    Without virtual pipeline stages the chunk is the stage, else it has the mean number of layers. With
    `Recompute.layers` only the layers' inputs, a h each. In addition the chunk's input and output, a h each: in fp32
    the input is the first norm's input, which is counted already, and the last layer's output is the input of the final
    norm. In bf16 the norms save copies; a chunk keeps what it received from the part of the model before it and what it
    sent to the one after it.
    """
    w, chunks = Widths.of(shape, layout), layout.virtual_pipeline
    layers = layout.pipeline_layers.counts(shape.layers)[stage] / chunks
    states, rotation = machine.size * w.h * micro.tokens, turns(w, machine) * micro.tokens
    if layout.recompute is Recompute.layers:
        return (layers + 1) * states + rotation
    ends = (stage == 0) + (stage == layout.pipeline - 1)  # of the model, in one of the stage's chunks
    edges = 2 - ends / chunks if machine.mixed else 1
    return layers * layer(shape, layout, machine, micro) + edges * states + rotation


def in_flight(layout: PlannedLayout, stage: int, count: int) -> int:
    """Micro-batches between their forward and backward pass under 1F1B (Narayanan et al. 2021, section 2.2): one per
    stage on the first stage, a single one on the last stage.

    With virtual pipeline stages, passes of a micro-batch through a chunk: a stage begins with all chunks but the last
    of a group of micro-batches, and two passes for each later stage (Megatron-Core's `get_pp_rank_microbatches`)."""
    later = layout.pipeline - 1 - stage
    if layout.virtual_pipeline == 1:
        return min(later + 1, count)
    count = max(count, layout.pipeline)
    group = micro_batch_group(count, layout.pipeline)
    return min(2 * later + (layout.virtual_pipeline - 1) * group + 1, layout.virtual_pipeline * count)


def held(
    shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, micro: PlannedMicroBatch, stage: int
) -> float:
    """Bytes on a stage when a backward pass begins.

    All micro-batches in flight. On the last stage, what the final norm saves: in bf16 its input in fp32, on a CPU the
    normed input. Under sequence parallelism, Megatron's one buffer for gathered states, a S h, for the whole run. On
    all stages but the first (on all with virtual ones), the gradient that was sent to the previous stage, a h, until
    the next one is sent.
    """
    w = Widths.of(shape, layout)
    total = in_flight(layout, stage, micro.count) * kept(shape, layout, machine, micro, stage)
    if stage == layout.pipeline - 1:
        total += 4 * w.h * micro.tokens * (machine.mixed + (not machine.cuda))
    if stage > 0 or layout.virtual_pipeline > 1:
        total += machine.size * w.h * micro.tokens
    return total + (machine.size * w.full * micro.tokens if w.sequence else 0)


def left_behind(
    shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, micro: PlannedMicroBatch, stage: int
) -> float:
    """Bytes that the other model keeps from its last pass: Megatron stores a chunk's input in an attribute of the
    model until the next pass."""
    inputs = layout.virtual_pipeline - (stage == 0)
    return inputs * machine.size * Widths.of(shape, layout).h * micro.tokens


def backward(
    shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, micro: PlannedMicroBatch, stage: int
) -> float:
    """Bytes that the layers' backward pass needs beyond `held` at its peak, which is near its beginning:

    - in the final norm, on the last stage: four gradients in fp32 on a CPU, where it consists of single operations,
      16 h; on CUDA one in, one out, and one in the type of the weights;
    - in the last layer's feed-forward part: the gradients of the residual stream, a h, and of SwiGLU's product and one
      of its halves, 2 a f; or instead of the latter the gradient of the second weight, a f h, under sequence
      parallelism with the gathered gradient of the states. Fused, there is no such gradient of a weight. `one_swiglu`
      has the gradients of its product and of both halves, 3 a f. What the norm saved is freed by then. With experts
      also the gradient of the rows' outputs before and after they are sent, 2 a h for each row.

    With `Recompute.layers` the activations of one layer are added.
    """
    w, a, S, last = Widths.of(shape, layout), machine.size, micro.tokens, stage == layout.pipeline - 1
    weight = 0 if machine.fused else w.weight
    second_weight = a * (w.f * S + weight + (w.full * S if w.sequence else 0))
    gating = a * w.h * S + max(second_weight, (3 if machine.one_swiglu else 2) * a * w.f * S)
    gating += 2 * a * w.full * w.rows * S
    if layout.recompute is Recompute.layers:
        gating += whole_layer(shape, layout, machine, micro)
    if not last:
        return gating
    closing = (8 + a if machine.cuda else 16) * w.h * S
    gone = 4 * w.h * S * (1 if machine.cuda else 2)
    return max(closing, gating - gone)


def reading(
    shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, micro: PlannedMicroBatch, stage: int
) -> float:
    """Peak bytes of a stage's layers in a pass without gradient.

    The stage's input, the layer's input (the same if a chunk of the stage has one layer) and what rotates, `turns`,
    which their callers hold; on all stages but the last the output that was sent to the next stage; under sequence
    parallelism the buffer of gathered states; and the largest of three moments of a layer:

    - attention: the normed input h, the joint projection, rotated queries and keys (in Transformer Engine's layers also
      the normed ones), four of the queries' width on the grid, and log-sum-exps;
    - SwiGLU: the residual stream, the normed input, and 3 f, or 5 f without `one_swiglu`; with experts the router's
      numbers, and the rows before and after they are sent;
    - under sequence parallelism the sum of the output projection over the tensor ranks: queries, keys and values as
      above, the attention's output, the whole product (twice with gloo, which copies it), its sum, the normed input.
    """
    w, a, S = Widths.of(shape, layout), machine.size, micro.tokens
    joint = w.q + 2 * w.k + (2 if machine.te else 1) * (w.q + w.k)
    attending = a * (w.h + joint) * S + (4 * a * w.q + 4 * w.heads) * micro.grid
    gating = a * (2 * w.h + (3 if machine.one_swiglu else 5) * w.f + w.full * w.rows) * S + mixture(w, machine) * S
    summing = a * (joint + w.q + w.full * (1 if machine.cuda else 2) + 2 * w.h) * S if w.sequence else 0
    sends = stage < layout.pipeline - 1 or layout.virtual_pipeline > 1
    inputs = 2 if layout.pipeline_layers.counts(shape.layers)[stage] > layout.virtual_pipeline else 1
    around = inputs * w.h + (w.h if sends else 0) + (w.full if w.sequence else 0)
    return (a * around + turns(w, machine)) * S + max(attending, gating, summing)
