"""The three families of language models told apart by who may look at whom."""

from __future__ import annotations

import torch
from torch import Tensor


def bidirectional_mask(length: int) -> Tensor:
    """Encoder (BERT): every position sees every position. (length, length) bool, true where a row may attend to a column."""
    return torch.ones(length, length, dtype=torch.bool)


def causal_mask(length: int) -> Tensor:
    """Decoder (GPT, LLaMA): position i sees positions 0 to i. (length, length) bool."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def encoder_decoder_mask(source: int, target: int) -> Tensor:
    """Encoder-decoder (T5) as one picture, (source + target, source + target) bool.

    The source sees all of itself and nothing of the target; the target sees the whole source (cross-attention) and its
    own past (Raffel et al. 2020, arXiv:1910.10683, figure 3).
    """
    mask = torch.zeros(source + target, source + target, dtype=torch.bool)
    mask[:source, :source] = bidirectional_mask(source)
    mask[source:, :source] = True
    mask[source:, source:] = causal_mask(target)
    return mask
