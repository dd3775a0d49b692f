"""The Compressive Transformer written from the paper (Rae et al. 2020, algorithms 1 and 2), row by row in numpy.

Nothing of the package is used but a decoder's weights. One stream; every row is a vector of width d.
"""

import copy
import math

import numpy as np


def softmax(scores):
    exp = np.exp(np.array(scores) - max(scores))
    return exp / exp.sum()


class Paper:
    """A decoder that reads one stream.

    Args:
        weights: of a `MemoryDecoder`, as numpy arrays.
        sizes: layers, heads, M, C, r.
        compression, loss: as the options have them.
        clamp, span: farthest distance told apart, and number of rows seen.
        before: whether layers normalise what goes into their blocks, instead of what comes out as in the paper.
    """

    def __init__(
        self, weights, layers, heads, mem_len, compressed_len, rate, compression, loss,
        clamp=10**9, span=10**9, before=False,
    ):  # fmt: skip
        self.weights, self.layers, self.heads = weights, layers, heads
        self.mem_len, self.compressed_len, self.rate = mem_len, compressed_len, rate
        self.compression, self.loss, self.clamp, self.span, self.before = compression, loss, clamp, span, before
        self.memory = [[] for _ in range(layers)]
        self.compressed = [[] for _ in range(layers)]

    def copy(self):
        return copy.deepcopy(self)

    def read(self, tokens):
        """Features of a segment's tokens, and the compression's loss, 0 where nothing is compressed."""
        table = self.weights["embed_tokens.tables.0.weight"]
        rows = [table[token] * math.sqrt(table.shape[1]) for token in tokens]
        losses = []
        for layer in range(self.layers):
            keys = self.compressed[layer] + self.memory[layer] + rows
            used = np.zeros(len(keys))
            attended = [
                self.attend(layer, self.going_in(layer, keys), len(keys) - len(rows) + i, used)
                for i in range(len(rows))
            ]
            used /= len(rows) * self.heads
            leaving, usage = [], []
            waiting = self.memory[layer] + rows
            first = len(self.compressed[layer])
            while len(waiting) > self.mem_len:
                leaving += waiting[: self.rate]
                waiting = waiting[self.rate :]
            usage = used[first : first + len(leaving)]
            if leaving:
                new = self.compress(layer, leaving, usage)
                losses.append(self.lost(layer, rows, leaving, new))
                kept = (self.compressed[layer] + new)[::-1][: self.compressed_len]
                self.compressed[layer] = kept[::-1]
            self.memory[layer] = waiting
            rows = [self.feed_forward(layer, x, a) for x, a in zip(rows, attended, strict=True)]
        return np.array(rows), (np.mean(losses) if losses else 0.0)

    def projections(self, layer):
        """``W_q, W_k, W_v`` of every head, each ``[D, d]``."""
        q, k, v = np.split(self.weights[f"layers.{layer}.self_attn.qkv_proj.weight"], 3)
        return list(zip(*(np.split(w, self.heads) for w in (q, k, v)), strict=True))

    def attend(self, layer, keys, place, used):
        """What the row at *place* of *keys* reads; adds its weights to *used*."""
        read_out = []
        embedding = np.split(self.weights["positions.projection"][layer], self.heads)
        for head, (w_q, w_k, w_v) in enumerate(self.projections(layer)):
            content = w_q @ keys[place] + self.weights["positions.content_bias"][head]
            position = w_q @ keys[place] + self.weights["positions.position_bias"][head]
            seen = range(max(0, place - self.span + 1), place + 1)
            scores = []
            for j in seen:
                distance = embedding[head] @ self.sinusoid(min(place - j, self.clamp), len(keys[j]))
                scores.append((content @ (w_k @ keys[j]) + position @ distance) / math.sqrt(len(content)))
            weights = softmax(scores)
            used[seen.start : seen.stop] += weights
            read_out.append(sum(weight * (w_v @ keys[j]) for weight, j in zip(weights, seen, strict=True)))
        return self.weights[f"layers.{layer}.self_attn.out_proj.weight"] @ np.concatenate(read_out)

    def sinusoid(self, distance, width):
        angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
        return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])

    def feed_forward(self, layer, x, attended):
        x = x + attended if self.before else self.norm(layer, "self_attn_layer_norm", x + attended)
        fc1, fc2 = (
            [self.weights[f"layers.{layer}.feed_forward.{name}.{what}"] for what in ("weight", "bias")]
            for name in ("fc1", "fc2")
        )
        normed = self.norm(layer, "final_layer_norm", x) if self.before else x
        y = fc2[0] @ np.maximum(fc1[0] @ normed + fc1[1], 0) + fc2[1]
        return x + y if self.before else self.norm(layer, "final_layer_norm", x + y)

    def going_in(self, layer, rows):
        """What the attention is given of rows."""
        return [self.norm(layer, "self_attn_layer_norm", row) for row in rows] if self.before else rows

    def norm(self, layer, name, x):
        gain, bias = (self.weights[f"layers.{layer}.{name}.{what}"] for what in ("weight", "bias"))
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * gain + bias

    def compress(self, layer, old, usage):
        groups = [old[i : i + self.rate] for i in range(0, len(old), self.rate)]
        if self.compression == "mean-pool":
            return [sum(group) / self.rate for group in groups]
        if self.compression == "max-pool":
            return [np.max(group, axis=0) for group in groups]
        if self.compression == "most-used":
            best = sorted(range(len(old)), key=lambda row: -usage[row])[: len(groups)]
            return [old[row] for row in sorted(best)]
        name = f"memory.compressions.{layer}."
        if self.compression == "conv":
            kernel, bias = self.weights[name + "conv.weight"], self.weights[name + "conv.bias"]
            return [sum(kernel[:, :, j] @ row for j, row in enumerate(group)) + bias for group in groups]
        ends = range(self.rate - 1, len(old), self.rate)
        return [self.dilated(name, old, math.ceil(math.log2(self.rate)), end) for end in ends]

    def dilated(self, name, old, depth, place):
        """Output *place* of the stack's first *depth* convolutions, after an activation unless it is the last."""
        if place < 0:
            return np.zeros_like(old[0])
        if depth == 0:
            return old[place]
        kernel, bias = (self.weights[f"{name}convs.{depth - 1}.{what}"] for what in ("weight", "bias"))
        x = [self.dilated(name, old, depth - 1, p) for p in (place - 2 ** (depth - 1), place)]
        if depth > 1:
            x = [np.maximum(row, 0) for row in x]
        return kernel[:, :, 0] @ x[0] + kernel[:, :, 1] @ x[1] + bias

    def lost(self, layer, rows, old, new):
        if self.loss == "none":
            return 0.0
        if self.loss == "auto-encoding":
            name = f"memory.losses.{layer}.decoder."
            kernel, bias = self.weights[name + "weight"], self.weights[name + "bias"]
            decoded = [kernel[:, :, j].T @ row + bias for row in new for j in range(self.rate)]
            return np.mean([(a - b) ** 2 for a, b in zip(old, decoded, strict=True)])
        rows, old, new = (self.going_in(layer, part) for part in (rows, old, new))
        differences = []
        for w_q, w_k, w_v in self.projections(layer):
            for h in rows:
                reads = []
                for memory in (old, new):
                    weights = softmax([(w_q @ h) @ (w_k @ row) / math.sqrt(len(w_q)) for row in memory])
                    reads.append(sum(weight * (w_v @ row) for weight, row in zip(weights, memory, strict=True)))
                differences.append((reads[0] - reads[1]) ** 2)
        return np.mean(differences)
