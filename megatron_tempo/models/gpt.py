"""The Megatron GPT model on packed micro-batches, with a language-model head or a value head."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_tempo.config.choices import Layers, Logits
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.kernels import Kernels
from megatron_tempo.kernels.linear_logprobs import linear_logprobs_and_entropy
from megatron_tempo.kernels.self_certainty import self_certainty
from megatron_tempo.kernels.truncated import truncate_logits_
from megatron_tempo.kernels.truncation import Truncation
from megatron_tempo.models.decoder import canonical_name
from megatron_tempo.models.families import block_spec, token_multiple
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.rotary import Rotary

EMBEDDING = "embedding.word_embeddings.weight"
LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.")
EXPERT_NAME = re.compile(r"\.experts\.(\d+)\.")


class PackedGPT(GPTModel):
    """Megatron's GPT model whose forward takes a packed `MicroBatch` of S tokens, or a context rank's S / c of them.

    Rotary angles depend on each token's position in its own sequence. This replaces Megatron's thd path, which loops
    over sequences. `kernels`: for the head, and for the losses on its outputs. `chunk`: under virtual pipeline stages,
    which of this rank's chunks of the model this is (see `chunks.ModelChunks`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        layout: Layout,
        kernels: Kernels,
        *,
        tied: bool,
        chunk: int = 0,
    ) -> None:
        last_chunk = layout.virtual_pipeline - 1
        with layout.groups.current():
            super().__init__(
                config,
                block_spec(config, shape, layout, chunk),
                vocab_size=padded_vocab(shape.vocab, layout.tensor),
                max_sequence_length=shape.max_positions,
                pre_process=layout.is_first_stage and chunk == 0,
                post_process=layout.is_last_stage and chunk == last_chunk,
                vp_stage=chunk if last_chunk else None,
                share_embeddings_and_output_weights=tied,
                position_embedding_type="none",  # Megatron has only one rotary embedding for all layers; see `Rotary`
                pg_collection=layout.groups,
            )
        self.shape = shape
        self.rotary = Rotary(shape.ropes, shape.head_dim, config.params_dtype, fused=config.apply_rope_fusion)
        self.kernels = kernels
        self.token_multiple = token_multiple(config)
        self.attends_on_grid = config.transformer_impl == Layers.local.name
        self.experts_before = 0  # experts of a layer on the expert ranks before this one
        if shape.experts is not None:
            self.experts_before = layout.expert_rank * (shape.experts.count // layout.expert)
            self._mark_experts()

    def _mark_experts(self) -> None:
        """Let Megatron reduce the experts' gradients over their own replicas, in buffers of their own.

        Megatron does so only if there are several expert ranks. With one, experts that are cut over fewer ranks than
        other matrices would see a part of the tokens each, and nobody would sum their gradients.
        """
        for name, parameter in self.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False

    @property
    def chunks(self) -> list[PackedGPT]:
        """This rank's chunks of the model: itself."""
        return [self]

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters, by the names that weight tables and checkpoints use."""
        return {canonical_name(name): parameter for name, parameter in self.named_parameters()}

    def names_in_checkpoints(self) -> dict[nn.Parameter, str]:
        """A name for each parameter that does not depend on the layout: the one that it has on a single rank.

        A tied output matrix, which the last of several stages has, has the name of the input embedding.
        """
        names = {}
        for name, parameter in self.weights().items():
            if layer := LAYER_NAME.match(name):
                number = self.decoder.layers[int(layer[1])].layer_number - 1  # Megatron counts from 1, over all stages
                name = f"decoder.layers.{number}.{name[layer.end() :]}"
            if expert := EXPERT_NAME.search(name):
                number = self.experts_before + int(expert[1])
                name = f"{name[: expert.start()]}.experts.{number}.{name[expert.end() :]}"
            tied = name == "output_layer.weight" and self.share_embeddings_and_output_weights
            names[parameter] = EMBEDDING if tied else name
        return names

    def forward(self, micro: MicroBatch) -> Tensor:
        """Returns hidden states [S / c (/ tensor), 1, hidden], or on the last stage the head's output."""
        embedded = self.embedding(input_ids=micro.tokens, position_ids=None) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self.rotary(micro.positions),
            packed_seq_params=micro.packing,
        )
        return self.head(hidden, micro) if self.post_process else hidden

    def head(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        raise NotImplementedError


class LanguageModel(PackedGPT):
    """The actor's network. Its head returns log-probabilities and entropies of a micro-batch's R response tokens.

    Only tokens that predict a response token go through the output layer. Prompts have no logits.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        layout: Layout,
        kernels: Kernels,
        logits: Logits,
        temperature: float,
        chunk: int = 0,
        truncation: Truncation | None = None,
    ) -> None:
        super().__init__(config, shape, layout, kernels, tied=shape.tied, chunk=chunk)
        self.logits = logits
        self.temperature = temperature
        self.truncation = truncation
        self.reads_certainty = False  # whether the head returns self-certainty instead (`Actor.self_certainty`)

    def head(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """Hidden states [S / c (/ tensor), 1, hidden] -> log pi(target), entropy at `temperature`: float32 [2, R].

        With `truncation` both are of the truncated distribution that the engine samples from. Where `reads_certainty`:
        the self-certainty of the distribution without truncation, float32 [1, R].
        """
        outputs, ranks = micro.predicting, self.pg_collection.tp
        if self.config.sequence_parallel:
            predicting = gather_from_sequence_parallel_region(hidden, group=ranks)[outputs.local, 0]
        else:
            predicting = copy_to_tensor_model_parallel_region(hidden[outputs.local, 0], group=ranks)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight = self.output_layer.weight if weight is None else weight
        args = (outputs.targets, self.shape.vocab, self.temperature, ranks)
        if self.reads_certainty:
            certainty = self_certainty(predicting, weight, *args[1:], self.kernels.linear_logprobs_and_entropy)
            return outputs.gather(certainty, self.pg_collection.cp)[None]
        if self.logits is Logits.stored:
            logits = functional.linear(predicting, weight)
            if self.truncation is not None:
                truncate_logits_(logits, *args, self.truncation)
            results = self.kernels.logprobs_and_entropy(logits, *args)
        elif self.truncation is None:
            results = self.kernels.linear_logprobs_and_entropy(predicting, weight, *args)
        else:  # the fused kernel sees a part of a row at a time, and what is kept depends on all of it
            results = linear_logprobs_and_entropy(predicting, weight, *args, self.truncation)
        return torch.stack([outputs.gather(x, self.pg_collection.cp) for x in results])


class ValueHead(nn.Module):
    """Computes one number per token. Its weights start at zero, so an untrained critic predicts 0.

    Weights, products and values are always fp32. Every tensor rank has the whole weight. Under sequence parallelism
    each rank applies it to its own tokens, and Megatron sums the gradients as it does for norms.
    """

    def __init__(self, config: TransformerConfig, ranks: dist.ProcessGroup) -> None:
        """`ranks`: the tensor ranks."""
        super().__init__()
        self.ranks = ranks
        self.sequence_parallel = config.sequence_parallel
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[S / c (/ tensor), 1, hidden] -> [S / c]."""
        values = functional.linear(hidden.float(), self.weight, self.bias)
        if self.sequence_parallel:
            # Every tensor rank computes the same loss from the gathered values, so gradients are split, not summed.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.ranks)
        return values.flatten()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueHead:
        """Moves to the network's device, but stays fp32 when the network is converted to bf16."""
        super()._apply(lambda x: x.to(fn(x).device), recurse)
        return self


class ValueModel(PackedGPT):
    """The critic's network: the same decoder with a scalar head, which returns a micro-batch's R + m values."""

    def __init__(
        self, config: TransformerConfig, shape: ModelShape, layout: Layout, kernels: Kernels, chunk: int = 0
    ) -> None:
        super().__init__(config, shape, layout, kernels, tied=False, chunk=chunk)
        if self.post_process:
            self.output_layer = ValueHead(config, layout.groups.tp)

    def head(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """Hidden states [S / c (/ tensor), 1, hidden] -> values of `micro.value_rows`, float32 [R + m]."""
        return micro.valued.gather(self.output_layer(hidden)[micro.valued.local], self.pg_collection.cp)
