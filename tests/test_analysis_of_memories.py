"""Figures of every memory: means are over current tokens alone, and layers may have other numbers of slots."""

import math

import pytest
import torch

from lamemo_fairseq.analysis import Attention, Collected, Losses, collect, record, report
from lamemo_fairseq.data.dictionary import TextDictionary
from lamemo_fairseq.models.language_models import LaMemoLanguageModel
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .core.helpers import first_of_each_memory
from .helpers import VARIANTS, random_tokens, split_of, tiny_decoder
from .test_analysis import Heard

N = 4
DENSE = next(variant for variant in VARIANTS if variant[2] == "dense")


def model_of(variant):
    return LaMemoLanguageModel(tiny_decoder(variant, mem_len=5, tokens_per_sample=N))


def batches():
    """Eight whole segments of two streams."""
    task = SegmentLanguageModelingTask(SegmentLanguageModelingConfig(), TextDictionary())
    split = split_of(random_tokens(1, 16 * N).tolist(), N)
    return task.get_batch_iterator(split, max_sentences=2, as_streams=True).next_epoch_itr(shuffle=False)


@pytest.mark.parametrize("variant", [*first_of_each_memory().values(), DENSE], ids="-".join)
def test_current_tokens_alone_count(variant):
    """Against all weights that the backend was told: memory tokens may stand behind the last current token."""
    model, heard = model_of(variant), Heard()
    collected = collect(model, batches())
    with torch.no_grad(), record(model.decoder, heard):
        for batch in batches():
            model(**batch["net_input"])
    for layer in range(len(model.decoder.layers)):
        told = [weights for number, weights in heard.weights if number == layer]
        most = max(weights.size(3) for weights in told)
        full = torch.cat([weights for weights in told if weights.size(3) == most])
        behind = full.size(2) - N
        assert (behind > 0) == (variant[0] == "associative")
        slots = full[:, :, :N, : most - behind - N]
        expected = slots.mean((0, 1, 2)).tolist()
        assert collected.attention.by_slot(layer).tolist() == pytest.approx(expected, rel=1e-9)
        assert (collected.attention.by_distance(layer) >= 0).all()
    assert len(report.attention_by_slot({"model": collected})) == collected.slots
    assert len(report.attention_by_distance({"model": collected})) == collected.slots + N


def test_a_layer_with_more_slots_than_others():
    """By slot all layers count, and by distance those that have a key there."""
    collected, weights = Collected(N, 2, Losses(N)), [torch.rand(1, 2, N, slots + N).tril(slots) for slots in (2, 6)]
    collected.attention = Attention()
    for layer, of_layer in enumerate(weights):
        collected.attention.add(layer, of_layer / of_layer.sum(-1, keepdim=True))
    models = {"model": collected}
    by_slot, by_distance = report.attention_by_slot(models), report.attention_by_distance(models)
    assert [line["offset"] for line in by_slot] == [*range(-6, 0)]
    assert [line["layer 1"] is None for line in by_slot] == [True] * 4 + [False] * 2
    shares = [float(collected.attention.by_slot(layer).sum()) for layer in range(2)]
    assert sum(line["mean"] for line in by_slot) == pytest.approx(sum(shares) / 2, rel=1e-9)
    assert by_slot[0]["mean"] == pytest.approx(by_slot[0]["layer 2"] / 2, rel=1e-9)
    assert [line["distance"] for line in by_distance] == [*range(10)]
    assert [line["layer 1"] is None for line in by_distance] == [False] * 6 + [True] * 4
    assert by_distance[9]["mean"] == by_distance[9]["layer 2"]
    assert by_distance[5]["mean"] == pytest.approx((by_distance[5]["layer 1"] + by_distance[5]["layer 2"]) / 2)
    (into,) = [line["into memory"] for line in report.figure1(models, paper=False) if line["offset"] == -5]
    assert into == pytest.approx(sum(line["mean"] for line in by_slot[-5:]), rel=1e-9) and math.isfinite(into)
