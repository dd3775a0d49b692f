"""Block-Recurrent Transformers in numpy, from the paper: nothing of the package is used.

Shapes: one stream; n tokens of a window, M tokens that a token sees, S states, H heads, D size of a head,
d model width.
"""

import math

import numpy as np

from .paper import Paper


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def attend(scores, values):
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


class BlockRecurrentPaper(Paper):
    """The model in numpy: each layer passes a whole text, token by token, and its states window by window."""

    def __init__(self, decoder, variant, window, mem_len, recurrent, pre_norm=False):
        super().__init__(decoder, pre_norm)
        self.sinusoids, self.lstm = variant[1] != "t5", variant[2] == "lstm"
        self.window, self.mem_len, self.recurrent = window, mem_len, recurrent
        self.states, self.unit = {}, 128 / decoder.config.own_options.recurrent_scale

    def of_heads(self, rows, weight):
        return (rows @ weight.T).reshape(len(rows), self.heads, -1)

    def score(self, layer, head, i, j, q, k):
        """``|a_h| (q . k + b)`` for a distance of at least 1."""
        scale = abs(self.w[f"layers.{layer}.self_attn.head_scale"][head])
        if self.sinusoids:
            u, v = self.w["positions.content_bias"][head], self.w["positions.position_bias"][head]
            return scale * ((q + u) @ k + (q + v) @ self.distance(layer, i - j)[head])
        distance = i - j
        if distance >= 16:  # half of the 32 biases are for distances up to 128, evenly by the logarithm
            distance = min(31, 16 + int(16 * math.log(distance / 16) / math.log(128 / 16)))
        return scale * (q @ k + self.unit * self.w["positions.table"][layer, head, distance])

    def layer(self, layer, rows):
        """The rows of a text after a layer."""
        name = f"layers.{layer}.self_attn."
        normed = self.norm(layer, "self_attn_layer_norm", rows) if self.pre_norm else rows
        width = len(self.w[name + "qkv_proj.weight"]) // 3
        q, k, v = (self.of_heads(normed, self.w[name + "qkv_proj.weight"][n * width :][:width]) for n in range(3))
        q, k = unit(q), unit(k)
        own = np.zeros_like(q)
        for i, h in np.ndindex(*own.shape[:2]):
            seen = range(max(0, i - self.mem_len), i)
            if seen:
                own[i, h] = attend(np.array([self.score(layer, h, i, j, q[i, h], k[j, h]) for j in seen]), v[seen, h])
        self.past = getattr(self, "past", {}) | {layer: (k, v)}
        if layer not in self.recurrent:
            return self.after(layer, rows, own)
        cross, queries = np.zeros_like(own), unit(self.of_heads(normed, self.w[name + "state_query.weight"]))
        cell = f"memory.cells.{self.recurrent.index(layer)}."
        states = self.w[cell + "first_states"]
        for start in range(0, len(rows), self.window):
            end = min(start + self.window, len(rows))
            state_q, token_q, state_k, state_v = self.projected(cell, states)
            for i, h in np.ndindex(end - start, self.heads):
                scale = abs(self.w[name + "state_scale"][h])
                cross[start + i, h] = attend(scale * (state_k[:, h] @ queries[start + i, h]), state_v[:, h])
            seen = slice(max(0, start - self.mem_len), end)
            read = np.zeros((2, *state_q.shape))
            for s, h in np.ndindex(len(states), self.heads):
                scales = (abs(self.w[f"{cell}{which}_scale"][h]) for which in ("own", "token"))
                read[0, s, h] = attend(next(scales) * (state_k[:, h] @ state_q[s, h]), state_v[:, h])
                read[1, s, h] = attend(next(scales) * (k[seen, h] @ token_q[s, h]), v[seen, h])
            states = self.gated(cell, states, np.concatenate([one.reshape(len(states), -1) for one in read], axis=1))
        self.states[layer] = states
        return self.after(layer, rows, np.concatenate([own, cross], axis=1))

    def projected(self, cell, states):
        rms = np.sqrt((states**2).mean(1, keepdims=True) + 1e-6)
        rows = states / rms * self.w[cell + "norm_gain"] + self.w[cell + "identities"]
        q, token_q, k, v = (self.of_heads(rows, weight) for weight in np.split(self.w[cell + "proj.weight"], 4))
        return unit(q), unit(token_q), unit(k), v

    def gated(self, cell, states, h):
        def mapped(name):
            return h @ self.w[f"{cell}gate.{name}.weight"].T + self.w[f"{cell}gate.{name}.bias"]

        if self.lstm:
            kept, new = sigmoid(mapped("forget") + 1), sigmoid(mapped("input") - 1)
            return states * kept + np.tanh(mapped("value")) * new
        g = sigmoid(self.w[cell + "gate.bias"])
        return states * g + mapped("value") * (1 - g)

    def text(self, embedded):
        """Features of a text; `past` and `states` are what it leaves."""
        rows = embedded
        for layer in range(self.layers):
            rows = self.layer(layer, rows)
        return rows


def paper_of(decoder, variant, recurrent=(0,)):
    pre_norm = decoder.config.decoder_normalize_before
    return BlockRecurrentPaper(decoder, variant, decoder.memory.period, decoder.memory.slots, list(recurrent), pre_norm)
