"""Every registered implementation of attention computes what the plain one does, own ones included."""

import pytest
import torch

from lamemo_fairseq.core.attention import BACKENDS, RelativeBias, causal_attention
from lamemo_fairseq.core.memory.lookahead import lookahead_attention

from .attention_cases import CASES, NAMES, computed
from .helpers import first_of_each_memory, random_tokens, tiny_decoder

# The kernels run in other dtypes: test_fused.py.
IMPLEMENTED = sorted({*causal_attention._implementations, *BACKENDS.names()} - {"eager", "fused", "auto"})
every_backend = pytest.mark.parametrize("backend", IMPLEMENTED)


@every_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_output_and_gradients_are_those_of_plain_attention(backend, case):
    if case.kind != "causal" and not lookahead_attention.has(backend):
        pytest.skip("the backend has no look-ahead attention")
    expected = computed(case, "eager", torch.float64, "cpu")
    found = computed(case, backend, torch.float64, "cpu")
    for name in NAMES:
        if expected[name] is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)


@every_backend
def test_options_of_a_call(backend):
    """A scale, no normaliser, and dropout that drops weights and keeps their mean."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, rows, 4, generator=generator, dtype=torch.float64) for rows in (3, 300))
    v, bias = torch.ones_like(k), RelativeBias(table=torch.randn(2, 300, 4, generator=generator, dtype=torch.float64))
    weighted = torch.randn(k.shape, generator=generator, dtype=torch.float64)
    scaled = [causal_attention(name, q, k, weighted, bias, scale=0.1).output for name in (backend, "eager")]
    torch.testing.assert_close(*scaled, rtol=0, atol=1e-9)
    plain = causal_attention(backend, q, k, weighted, bias, scale=0.1, need_normalizer=False).output
    torch.testing.assert_close(plain, scaled[1], rtol=0, atol=1e-9)
    torch.manual_seed(0)
    dropped = [causal_attention(backend, q, k, v, bias, dropout=0.5, scale=0.1).output for _ in range(40)]
    assert not torch.equal(dropped[0], dropped[1])
    assert abs(torch.stack(dropped).mean() - 1) < 0.02 and 0.03 < torch.stack(dropped).std() < 0.2


@every_backend
@pytest.mark.parametrize("memory", first_of_each_memory())
def test_models_read_and_learn_as_with_plain_attention(backend, memory):
    variant, tokens, found = first_of_each_memory()[memory], random_tokens(2, 10), []
    operations = [o for layer in tiny_decoder(variant).layers for o in layer.self_attn.operations()]
    if not all(operation.has(backend) for operation in operations):
        pytest.skip("the backend lacks an operation of this memory")
    for name in (backend, "eager"):
        model, state, losses = tiny_decoder(variant, attention_backend=name).train(), None, []
        for segment in tokens.split(3, dim=1)[:3]:
            features, state, _ = model(segment, state)
            losses.append(model.loss(features, segment))
        gradients = torch.autograd.grad(sum(losses), list(model.parameters()), allow_unused=True)
        found.append([torch.stack(losses), *(g for g in gradients if g is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
