"""Which rows of the store the memorizing memory retrieves: ties, blocks, and kernels against plain operations."""

import numpy as np
import pytest
import torch

from lamemo_fairseq.core.memory.memorizing import eager, search

from ..gpus import DEVICE


@pytest.mark.parametrize("columns", [1, 7, 64, 65, 100, 611, 2049])
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_the_largest_are_those_of_a_stable_sort(columns, values):
    """With few values nearly all are ties."""
    scores = np.random.default_rng(columns).integers(0, values, (3, 2, columns)).astype(np.float32)
    scores[1, 0, columns // 2 :] = -np.inf
    for count in {1, min(3, columns), min(40, columns)}:
        expected = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
        assert torch.equal(search.largest(torch.from_numpy(scores), count), torch.from_numpy(expected))


def test_equal_keys_are_told_apart_by_age():
    """In half precision the products of other keys would be equal too."""
    keys = torch.nn.functional.normalize(torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    keys = torch.cat([keys, keys, keys], dim=2)
    q = keys[:, :, 7:8] * 9
    assert search.nearest(q, keys, None, 3).flatten().tolist() == [2, 7, 12]
    hidden = torch.tensor([[False, False, True, *[False] * 12]])
    assert search.nearest(q, keys, hidden, 2).flatten().tolist() == [7, 12]


def test_products_are_compared_in_single_precision():
    q = torch.tensor([1.0, 2**-9]).half().view(1, 1, 1, 2)
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.125], [1.0, 0.25]]).half().view(1, 1, 3, 2)
    assert ((q @ keys.transpose(2, 3)) == 1).all()
    assert search.nearest(q, keys, None, 3).flatten().tolist() == [2, 1, 0]


@pytest.mark.parametrize(("size", "dtype"), [(6, torch.float32), (5, torch.float16)])
@pytest.mark.parametrize(("rows", "count"), [(200, 5), (93, 3), (40, 33), (1030, 2), (75, 17)])
def test_retrieval_by_kernels(rows, count, size, dtype, monkeypatch):
    """The same rows, ties included, the same read-outs and gradients; few groups of keys are left to `search`."""
    retrieval = pytest.importorskip("lamemo_fairseq.core.memory.memorizing.retrieval", reason="the kernels need Triton")
    generator = torch.Generator().manual_seed(0)
    q, grad, keys, values = (
        torch.randn(2, 2, n, size, generator=generator).to(DEVICE, dtype) for n in (7, 7, rows, rows)
    )
    # Products of eighths are exact: otherwise a library may round those of two equal keys differently.
    q, keys = ((8 * x).round() / 8 for x in (q, keys))
    keys[:, :, rows // 2 :] = keys[:, :, : -(-rows // 2)][:, :, : rows - rows // 2]  # every key twice
    expected = search.nearest(q, keys, None, count)
    if rows > 2 * count:
        found = retrieval.nearest(q, keys, count)
        assert found.tolist() == expected.sort(-1).values.tolist()
        with monkeypatch.context() as patch:
            patch.setattr(search, "AT_ONCE", 100)  # a stream and some queries at a time
            assert torch.equal(retrieval.nearest(q, keys, count), found)
    results = []
    for owner, exact in ((retrieval, dtype), (eager, torch.float64)):
        inputs = q.to(exact).requires_grad_()
        found = owner.retrieved_attention(inputs, keys.to(exact), values.to(exact), None, count, 0.7)
        results.append([*found, *torch.autograd.grad(found.output, inputs, grad.to(exact))])
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("finite", [0, 3, 40])
def test_maxima_that_are_no_numbers_choose_groups_once(finite):
    """Other groups would be written beyond the end of a row. A GPU's NaN has all bits but the sign."""
    retrieval = pytest.importorskip("lamemo_fairseq.core.memory.memorizing.retrieval", reason="the kernels need Triton")
    best = torch.full((2, 50), 2**31 - 1, dtype=torch.int32, device=DEVICE).view(torch.float32)
    best[:, :finite] = torch.arange(finite, device=DEVICE)
    assert best.isnan().sum() == 2 * (50 - finite)
    chosen = torch.full((2, 5), -1, dtype=torch.int32, device=DEVICE)
    counts = {"COUNT": 5, "PARTS": 8}
    retrieval.kernel.best_group_kernel[(2,)](best, chosen, 50, **counts, **retrieval._block(50, 1024))
    assert chosen.tolist() == [list(range(finite, finite + 5))] * 2


@pytest.mark.parametrize("rows", [10, 65_536])
def test_blocks_cover_every_query_once_and_bound_what_is_held(rows):
    batch, heads, queries, size = 5, 8, 150, 64
    seen = np.zeros((batch, queries), dtype=int)
    for streams, some in search.blocks(batch, heads, queries, rows, size):
        block = seen[streams, some]
        block += 1
        assert block.shape[0] * heads * rows * (block.shape[1] + size) <= search.AT_ONCE
    assert (seen == 1).all()
