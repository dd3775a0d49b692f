"""Losses of memories, added to a criterion's."""

from types import SimpleNamespace

import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion

from lamemo_fairseq.criterions.memory_losses import WithMemoryLosses
from lamemo_fairseq.models.language_models import MemoryLanguageModel

from .helpers import dictionary_of, random_tokens, segments_of, tiny_decoder


def test_the_loss_weighs_the_same_on_a_token_whatever_the_criterion_is_averaged_over():
    decoder = tiny_decoder(("compressive", "transformer-xl", "conv")).train()
    model, task = MemoryLanguageModel(decoder), SimpleNamespace(target_dictionary=dictionary_of(17))
    sizes, found = [], []
    for sentence_avg in (False, True):
        criterion = WithMemoryLosses(CrossEntropyCriterion(task, sentence_avg))
        for position, segment in segments_of(decoder, random_tokens(4, 5 * decoder.segment_length), split="train"):
            model.zero_grad()
            inputs = {"src_tokens": segment, "position": position}
            sample = {"net_input": inputs, "target": segment.contiguous(), "ntokens": segment.numel()}
            loss, size, logged = criterion(model, sample)
        loss.backward()
        norms = [
            sum(p.grad.square().sum() for name, p in model.named_parameters() if (".compressions." in name) == own)
            for own in (True, False)
        ]
        sizes.append(size)
        found.append([(norms[0] / norms[1]).sqrt(), logged["memory_compression"]])
        assert norms[0] > 0
    assert sizes == [segment.numel(), len(segment)]
    torch.testing.assert_close(found[0], found[1])
