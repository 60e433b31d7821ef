"""Results of models that stay with the ranks that own the rows, on every rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_tempo.models.actor import Actor
from megatron_tempo.types import Batch


def from_owners(actor: Actor, batch: Batch, own: Tensor) -> Tensor:
    """Numbers of all response tokens, from those of each rank's rows: [T] -> [T]. All rows are held. Collective."""
    lengths = batch.response_lengths.tolist()
    table = actor.gather(batch, pad_sequence(own.split(lengths), batch_first=True))
    return torch.cat([row[:length] for row, length in zip(table, lengths, strict=True)])
