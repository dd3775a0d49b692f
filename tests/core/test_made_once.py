"""Padded weights that the segments of an update share."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lamemo_fairseq.core import decoder as decoders
from lamemo_fairseq.core.kernels import aligned
from lamemo_fairseq.core.kernels.padded import made_once, of_weight

from .helpers import random_tokens, tiny_decoder

TOKEN, ASSOCIATIVE = ("token", "transformer-xl", "right"), ("associative", "transformer-xl", "right")


class Pads(TorchDispatchMode):
    """Counts operations that pad."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.overloadpacket.__name__ == "constant_pad_nd"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("variant", [TOKEN, ASSOCIATIVE], ids="-".join)
def test_segments_of_an_update_share_padded_weights(variant, checkpoint, monkeypatch):
    """The same features, and gradients but for rounding, with fewer pads; none are shared where layers run twice."""
    monkeypatch.setattr(aligned, "matters", lambda x: True)
    options = {"segment_length": 6, "bptt_segments": 2, "checkpoint_activations": checkpoint}
    odd = {"decoder_embed_dim": 10, "decoder_ffn_embed_dim": 13}
    found, pads = [], []
    for shared in (False, True):
        if not shared:
            monkeypatch.setattr(decoders, "made_once", lambda active: made_once(False))
        else:
            monkeypatch.setattr(decoders, "made_once", made_once)
        decoder = tiny_decoder(variant, dtype=torch.float32, **odd, **options).train()
        state = decoder.read_segment(random_tokens(2, 6), None).state
        with Pads() as counted:
            features = decoder.read_segment(random_tokens(2, 6, seed=1), state).features
        parameters = [p for name, p in decoder.named_parameters() if "embed_tokens" not in name]
        gradients = torch.autograd.grad(features.square().sum(), parameters, allow_unused=True)
        found.append([features, *(g for g in gradients if g is not None)])
        pads.append(counted.count)
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert pads[1] == pads[0] if checkpoint and variant == TOKEN else pads[1] < pads[0]


def test_nothing_outlives_the_pass():
    """What is made with gradient is another tensor than what is made without."""
    weight, made = torch.ones(2, requires_grad=True), []

    def make():
        made.append(weight * 2)
        return made[-1]

    with made_once():
        assert of_weight(weight, "a", make) is of_weight(weight, "a", make) is not of_weight(weight, "b", make)
        with torch.no_grad():
            assert not of_weight(weight, "a", make).requires_grad
        with made_once(False):
            assert of_weight(weight, "a", make) is not of_weight(weight, "a", make)
        assert of_weight(weight, "a", make) is made[0]
    assert of_weight(weight, "a", make) is made[-1] and len(made) == 6
