"""A Transformer with sinusoidal relative positions from the papers, in numpy and loops: nothing of the package is used.

Shapes: one stream; R rows, H heads, D size of a head, d model width.
"""

import math

import numpy as np


class Paper:
    """The shell of every model: one stream, and a query and a head at a time."""

    def __init__(self, decoder, pre_norm=False, farthest=None):
        self.pre_norm, self.farthest = pre_norm, farthest
        self.w = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
        self.layers, self.heads = len(decoder.layers), decoder.config.decoder_attention_heads

    def embedding(self, words):
        table = self.w["embed_tokens.tables.0.weight"]
        return np.array([table[word] * math.sqrt(table.shape[1]) for word in words])

    def distance(self, layer, distance):
        """``W_r sinusoid(distance)``: ``[H, D]``."""
        distance = distance if self.farthest is None else min(distance, self.farthest)
        weight = self.w["positions.projection"][layer]
        width = weight.shape[1]
        angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
        return (weight @ np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])).reshape(
            self.heads, -1
        )

    def score(self, layer, head, i, j, q, k):
        u, v, distance = self.w["positions.content_bias"], self.w["positions.position_bias"], i - j
        if j > i and "positions.ahead_position_bias" in self.w:
            u, v, distance = self.w["positions.ahead_content_bias"], self.w["positions.ahead_position_bias"], j - i
        r = self.distance(layer, distance)[head]
        return ((q + u[head]) @ k + (q + v[head]) @ r) / math.sqrt(len(q))

    def norm(self, layer, name, x):
        weight, bias = (self.w[f"layers.{layer}.{name}.{part}"] for part in ("weight", "bias"))
        return np.array([(row - row.mean()) / math.sqrt(row.var() + 1e-5) * weight + bias for row in x])

    def feed_forward(self, layer, x):
        w1, b1, w2, b2 = (
            self.w[f"layers.{layer}.feed_forward.{n}"] for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        )
        return np.maximum(x @ w1.T + b1, 0) @ w2.T + b2

    def through(self, layer, everything, current, seen):
        """Pass the last *current* of the rows ``everything [R, d]`` through a layer; row i attends to ``seen(i)``."""
        rows = everything[len(everything) - current :]
        if self.pre_norm:
            everything = self.norm(layer, "self_attn_layer_norm", everything)
        qkv = (everything @ self.w[f"layers.{layer}.self_attn.qkv_proj.weight"].T).reshape(len(everything), 3, -1)
        q, k, v = (qkv[:, part].reshape(len(everything), self.heads, -1) for part in range(3))
        attended = np.zeros((current, *q.shape[1:]))
        first = len(everything) - current
        for i in range(first, len(everything)):
            keys = list(seen(i))
            for h in range(self.heads):
                scores = np.array([self.score(layer, h, i, j, q[i, h], k[j, h]) for j in keys])
                weights = np.exp(scores - scores.max())
                attended[i - first, h] = weights @ v[keys, h] / weights.sum()
        return self.after(layer, rows, self.mixed(layer, q, k, v, attended))

    def after(self, layer, rows, attended):
        """What a layer makes of its rows ``[n, d]`` and the heads ``attended [n, H, D]``."""
        rows = rows + attended.reshape(len(rows), -1) @ self.w[f"layers.{layer}.self_attn.out_proj.weight"].T
        if self.pre_norm:
            return rows + self.feed_forward(layer, self.norm(layer, "final_layer_norm", rows))
        rows = self.norm(layer, "self_attn_layer_norm", rows)
        return self.norm(layer, "final_layer_norm", rows + self.feed_forward(layer, rows))

    def mixed(self, layer, q, k, v, attended):
        """What a memory makes of the heads ``attended [n, H, D]``, of the queries, keys and values ``[R, H, D]``."""
        return attended


def differences(function, at, step=1e-6):
    """The gradient of a scalar function by central differences."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        values = []
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            values.append(function(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient
