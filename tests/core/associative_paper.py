"""Associative memory in numpy, from the paper: nothing of the package is used.

Shapes: one stream; n tokens of a segment, m memory tokens, s cached rows, d model width, e width of a key.
"""

import math

import numpy as np

from .paper import Paper


class AssociativePaper(Paper):
    """The model in numpy."""

    limited = 0  # keys that overlap more with those of their segment than with z

    def __init__(self, decoder, *options):
        super().__init__(decoder, *options)
        own = decoder.config.own_options
        self.decay, self.value_unit = own.associative_decay, own.associative_value_lr_scale

    def map(self, layer, name):
        return self.w[f"layers.{layer}.self_attn.association.{name}"]

    def phi(self, u):
        """Features of ``u [e]``, one product at a time."""
        x = [max(v, 0.0) for v in u] + [max(-v, 0.0) for v in u]
        return np.array([x[i] * x[(i - j) % len(x)] for j in (1, 2, 3) for i in range(len(x))])

    def read(self, layer, rows, memory):
        A, z = memory
        read = []
        for h in rows:
            f = self.phi(self.map(layer, "query.weight") @ h)
            read.append(h + A @ f / (z @ f + 1e-5))
        return np.array(read)

    def write(self, layer, rows, memory, gammas):
        """Memory after the rows of the memory tokens; *gammas* are taken from there, or noted if there are none."""
        A, z = memory or (np.zeros((rows.shape[1], 12 * len(self.map(layer, "key.weight")) // 2)), 0.0)
        A, z = self.decay * A, self.decay * z
        keys = [self.phi(self.map(layer, "key.weight") @ m) for m in rows]
        values = [self.value_unit * self.map(layer, "value") @ m for m in rows]
        gates = [self.map(layer, "gate.weight") @ m + self.map(layer, "gate.bias") for m in rows]
        betas = [1 / (1 + np.exp(-gate[0])) for gate in gates]
        sizes = [z @ f + 1e-5 if memory else math.inf for f in keys]
        if not gammas:
            known = [n / (f @ f + 1e-5) if memory else 0.0 for f, n in zip(keys, sizes, strict=True)]
            gammas = [min(max(1 - share, 0.0), 1.0) for share in known]
        A_new, z_new = A.copy(), z + sum(gamma * f for gamma, f in zip(gammas, keys, strict=True))
        for f, v, beta, n in zip(keys, values, betas, sizes, strict=True):
            own = sum(beta * (f @ other) for beta, other in zip(betas, keys, strict=True))
            self.limited += own > n
            if own > n:  # not in the paper
                v, n = min(1, (z_new @ f + 1e-5) / own) * v, own
            A_new += beta * np.outer(v - A @ f / n, f)
        return (A_new, z_new), gammas

    def segment(self, x, tokens, memory, cache, gammas=None):
        """Features ``[n, d]``, and every layer's memory, rows ``[s + n, d]`` and gammas behind it."""
        rows, after, entered, noted = np.concatenate([x, tokens]), [], [], []
        for layer in range(self.layers):
            if memory[layer]:
                rows = self.read(layer, rows, memory[layer])
            entered.append(np.concatenate([cache[layer], rows[: len(x)]]))
            everything = np.concatenate([cache[layer], rows])
            rows = self.through(layer, everything, len(rows), lambda i: range(i + 1))
            written, used = self.write(layer, rows[len(x) :], memory[layer], gammas and gammas[layer])
            after.append(written)
            noted.append(used)
        return rows[: len(x)], after, entered, noted

    def text(self, embedded, period, mem_len):
        """Features of a text, and memory and cache behind it."""
        memory, cache, features = [None] * self.layers, [embedded[:0]] * self.layers, []
        for start in range(0, len(embedded), period):
            x = embedded[start : start + period]
            part, memory, entered, _ = self.segment(x, self.w["memory.tokens"], memory, cache)
            cache = [rows[max(len(rows) - mem_len, 0) :] for rows in entered]
            features.append(part)
        return np.concatenate(features), memory, cache
