"""The infinity-former from its paper, in numpy and loops: nothing of the package is used.

Shapes: T tokens, N of a segment, H heads, D size of a head, J basis functions, d model width.
"""

import math

import numpy as np


def normal(t, mean, variance):
    return math.exp(-((t - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


class InfinityFormer:
    """A decoder with the weights of *decoder*, for one text, one query and one head at a time."""

    def __init__(
        self, decoder, widths, penalty, tau, sigma, samples, sampling, mem_len, heads=2, pre_norm=False, farthest=None
    ):
        self.pre_norm, self.farthest = pre_norm, farthest
        self.penalty, self.tau, self.sigma = penalty, tau, sigma
        self.weights = {name: w.double().numpy() for name, w in decoder.state_dict().items()}
        self.samples, self.sampling, self.mem_len, self.heads = samples, sampling, mem_len, heads
        self.size = self.weights["positions.content_bias"].shape[1]
        count = self.weights["layers.0.self_attn.density_proj.weight"].shape[1]
        places = np.linspace(0, 1, count // len(widths))
        self.basis = [(place, width) for place in places for width in widths]

    def psi(self, t):
        return np.array([normal(t, place, width**2) for place, width in self.basis])

    def fit(self, points, rows):
        """Ridge regression as least squares with J more equations."""
        features = np.array([self.psi(t) for t in points] + list(math.sqrt(self.penalty) * np.eye(len(self.basis))))
        targets = np.concatenate([rows, np.zeros((len(self.basis), rows.shape[1]))])
        return np.linalg.lstsq(features, targets, rcond=None)[0]

    def extend(self, signal, rows, attended):
        if len(rows) == 0:
            return signal
        parts = [(i + 0.5) / len(rows) for i in range(len(rows))]
        if signal is None:
            return self.fit(parts, rows)
        levels = [(i + 0.5) / self.samples for i in range(self.samples)]
        points = levels
        if self.sampling == "sticky":
            mass = np.zeros(128)
            for mean, variance in attended:
                for b in range(128):
                    ends = [(edge / 128 - mean) / math.sqrt(2 * variance) for edge in (b, b + 1)]
                    mass[b] += (math.erf(ends[1]) - math.erf(ends[0])) / 2
            mass = mass / mass.sum() + 1e-6
            below = np.concatenate([[0], np.cumsum(mass)]) / mass.sum()
            points = np.interp(levels, below, np.arange(129) / 128)
        past = np.array([signal.T @ self.psi(t) for t in points])
        places = [self.tau * level for level in levels] + [self.tau + (1 - self.tau) * part for part in parts]
        return self.fit(places, np.concatenate([past, rows]))

    def layer_norm(self, x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def sinusoid(self, distance, width):
        angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
        return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])

    def attend(self, layer, rows, current, signal):
        """Outputs ``[N, d]``, and mean and variance of every head and query."""
        w, h_d = self.weights, self.heads * self.size
        prefix = f"layers.{layer}.self_attn."
        q_w, k_w, v_w = np.split(w[prefix + "qkv_proj.weight"], 3)
        out, out_long = np.split(w[prefix + "out_proj.weight"], 2, axis=1)
        output, attended = np.zeros((current, rows.shape[1])), []
        for i in range(len(rows) - current, len(rows)):
            heads, heads_long = np.zeros(h_d), np.zeros(h_d)
            for h in range(self.heads):
                part = slice(h * self.size, (h + 1) * self.size)
                q = q_w[part] @ rows[i]
                scores = []
                for j in range(i + 1):
                    away = i - j if self.farthest is None else min(i - j, self.farthest)
                    distance = w["positions.projection"][layer][part] @ self.sinusoid(away, rows.shape[1])
                    content = (q + w["positions.content_bias"][h]) @ (k_w[part] @ rows[j])
                    scores.append(content + (q + w["positions.position_bias"][h]) @ distance)
                alpha = np.exp(np.array(scores) / math.sqrt(self.size))
                alpha /= alpha.sum()
                heads[part] = sum(a * (v_w[part] @ rows[j]) for j, a in enumerate(alpha))
                if signal is None:
                    continue
                keys = signal @ w[prefix + "long_term_k_proj.weight"][part].T  # [J, D]
                s = keys @ q / math.sqrt(self.size)
                w_mean, w_variance = w[prefix + "density_proj.weight"]
                mean = 1 / (1 + math.exp(-(w_mean @ s)))
                variance = max(math.log1p(math.exp(w_variance @ s)), 1e-6)
                attended.append((mean, variance))
                expected = np.array([normal(mean, place, variance + width**2) for place, width in self.basis])
                heads_long[part] = expected @ (signal @ w[prefix + "long_term_v_proj.weight"][part].T)
            output[i - len(rows) + current] = out @ heads + out_long @ heads_long
        return output, attended

    def read(self, segments):
        """Scores ``[T, V]``, the KL divergence of every layer, head and token, and the signals at the end."""
        layers = max(int(name.split(".")[1]) for name in self.weights if name.startswith("layers.")) + 1
        slots, signals, scores, divergences = [None] * layers, [None] * layers, [], []
        embeddings = self.weights["embed_tokens.tables.0.weight"]
        for segment in segments:
            x, n = embeddings[segment] * math.sqrt(embeddings.shape[1]), len(segment)
            divergences.append([])
            for i in range(layers):
                rows = x if slots[i] is None else np.concatenate([slots[i], x])
                norm = f"layers.{i}.self_attn_layer_norm"
                seen = self.layer_norm(rows, norm) if self.pre_norm else rows
                output, attended = self.attend(i, seen, n, signals[i])
                keep = max(0, len(rows) - self.mem_len)
                slots[i], signals[i] = rows[keep:], self.extend(signals[i], rows[:keep], attended)
                x = x + output if self.pre_norm else self.layer_norm(x + output, norm)
                name, norm = f"layers.{i}.feed_forward.", f"layers.{i}.final_layer_norm"
                seen = self.layer_norm(x, norm) if self.pre_norm else x
                hidden = np.maximum(seen @ self.weights[name + "fc1.weight"].T + self.weights[name + "fc1.bias"], 0)
                hidden = hidden @ self.weights[name + "fc2.weight"].T + self.weights[name + "fc2.bias"]
                x = x + hidden if self.pre_norm else self.layer_norm(x + hidden, norm)
                divergences[-1] += [
                    math.log(self.sigma) - math.log(v) / 2 + v / (2 * self.sigma**2) - 0.5 for _, v in attended
                ]
            scores.append(x @ self.weights["output.weights.0"].T + self.weights["output.biases.0"])
        return np.concatenate(scores), divergences, signals
