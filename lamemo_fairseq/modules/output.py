"""Word embeddings in, word scores out: the full softmax.

Shapes: B streams, N tokens, V words, d model width, e embedding width.
"""

import math
from typing import Optional

import torch
from torch import Tensor, nn


class WordEmbedding(nn.Module):
    """Embeddings of width e, projected to d if narrower, times ``sqrt(d)``."""

    def __init__(self, words: int, input_dim: int, embed_dim: int):
        super().__init__()
        # No padding row: padding only ends a stream, where nothing that is scored can see it.
        self.embedding = nn.Embedding(words, input_dim)
        self.projection = nn.Linear(input_dim, embed_dim, bias=False) if input_dim != embed_dim else None
        self.scale = math.sqrt(embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N] -> [B, N, d]``."""
        x = self.embedding(tokens)
        if self.projection is not None:
            x = self.projection(x)
        return x * self.scale


class FullSoftmax(nn.Module):
    """Scores of all words, their weights tied to the embedding's or not, with a bias a word."""

    def __init__(self, words: int, output_dim: int, embed_dim: int, tied: Optional[nn.Embedding] = None):
        super().__init__()
        if tied is not None and tied.weight.shape != (words, output_dim):
            raise ValueError(
                f"tied embeddings are {tuple(tied.weight.shape)}, the output needs {(words, output_dim)}: "
                "--decoder-input-dim and --decoder-output-dim must be equal to share them"
            )
        self.projection = nn.Linear(embed_dim, output_dim, bias=False) if output_dim != embed_dim else None
        self.weight = nn.Parameter(torch.empty(words, output_dim)) if tied is None else tied.weight
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, features: Tensor) -> Tensor:
        """``[B, N, d] -> [B, N, V]``."""
        if self.projection is not None:
            features = self.projection(features)
        return nn.functional.linear(features, self.weight, self.bias)
