"""The released model's losses, hidden rows and gradients, in float64.

The released code passes scores, normalisers and alpha through float32. For the figures these steps were widened to
float64.
`golden` holds a selection; `LAMEMO_GOLDEN_DIR` names a folder with other cases.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.core.released import from_released, model_options

from ..gpus import DEVICE, gpu
from .helpers import config_of

FOLDER = Path(os.environ.get("LAMEMO_GOLDEN_DIR") or Path(__file__).parent / "golden")
# The same kernels run for LaMemo's memory (3) in the case of the same name: interpreted, these take long.
ON_A_GPU = {f"attn0_{name}.npz" for name in ("clamp", "longmem", "one", "preln", "ragged", "samelen", "shortmem")}
ZERO = 1e-13  # below it a gradient is nothing but rounding, as of a parameter that the loss does not depend on


def cases(on_a_gpu=frozenset()):
    found = sorted(FOLDER.glob("*.npz"))
    assert found, f"no golden cases in {FOLDER}"
    return [pytest.param(path, id=path.name, marks=[gpu] * (path.name in on_a_gpu)) for path in found]


def released_weights(case, prefix, layers):
    arrays = {k[len(prefix) :]: torch.from_numpy(case[k]) for k in case.files if k.startswith(prefix)}
    return from_released(arrays, layers)


def build(case, config, dtype=torch.float64, backend="eager") -> LanguageModel:
    chosen = {**model_options(config), "dropout": 0.0, "attention_backend": backend}
    chosen["segment_length"] = chosen.pop("tokens_per_sample")
    decoder = LanguageModel(config_of(config["vocab"], **chosen)).to(dtype)
    decoder.load_state_dict(released_weights(case, "param/", config["n_layer"]))
    return decoder


def assert_close(actual, expected, what, tolerance):
    actual, expected = actual.detach().cpu().numpy(), np.asarray(expected)
    assert actual.shape == expected.shape, what
    largest = np.abs(expected).max()
    if largest < ZERO:
        largest = 1.0
    error = np.abs(actual - expected).max() / largest
    assert error <= tolerance, f"{what}: off by {error:.2e} of the largest entry, {largest:.2e}"


@pytest.mark.parametrize("path", cases())
def test_golden(path):
    """The model as it is used, in float64."""
    compare(path, 1e-11)


@pytest.mark.parametrize("path", cases(ON_A_GPU))
def test_golden_fused(path):
    """The fused kernels, in float32."""
    pytest.importorskip("triton", reason="the fused backend needs Triton")
    compare(path, 1e-4, torch.float32, "fused", DEVICE)


def compare(path, tolerance, dtype=torch.float64, backend="eager", device="cpu"):
    case = np.load(path)
    config = json.loads(str(case["config"]))
    decoder = build(case, config, dtype, backend).to(device)
    tokens = torch.from_numpy(case["tokens"]).to(device)
    state, start = None, 0
    for k, length in enumerate(case["seg_lens"].tolist()):
        features, state, _ = decoder.read_segment(tokens[:, start : start + length], state)
        target = tokens[:, start + 1 : start + 1 + length]
        log_probs = decoder.log_probs(features)
        nll = -log_probs.gather(2, target.unsqueeze(2)).squeeze(2)
        assert_close(nll, case[f"nll/{k}"], f"nll of segment {k}", tolerance)
        assert_close(features, case[f"hidden/{k}"], f"hidden rows of segment {k}", tolerance)
        start += length

    nll.mean().backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    wanted = released_gradients(case, config["n_layer"])
    assert set(wanted) == set(gradients)
    for name, value in wanted.items():
        assert_close(gradients[name], value, f"gradient of {name}", tolerance)


def released_gradients(case, layers):
    """The released gradients under our names; tied weights have one, under the embedding's."""
    arrays = {k[len("grad/") :]: torch.from_numpy(case[k]) for k in case.files if k.startswith("grad/")}
    return from_released(arrays, layers)
