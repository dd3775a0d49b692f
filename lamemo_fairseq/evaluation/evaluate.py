"""Evaluate streams rather than sentences in fairseq-eval-lm.

fairseq's own evaluation scores each sequence of a batch by itself. Where a segment's end cuts a word, that evaluation
counts two words. It leaves out words with the id of padding. With several ranks it reports the first rank's share.

Shapes: B streams, N tokens of a segment, R of them in all that are not padding, V words.
"""

import importlib
import json
import logging
import math
from contextlib import ExitStack
from itertools import tee
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from fairseq import utils
from fairseq.logging.meters import StopwatchMeter
from torch import Tensor

from ..core.memory import DivergenceError
from ..core.memory.position import SegmentPosition, real_tokens
from ..data.segments import SegmentDataset
from ..host.commands import names_of
from ..host.ensembles import mean_over_models
from ..host.ranks import is_first_rank
from ..host.stand_in import stand_in
from .output import TokenLog, print_words, words_of
from .units import Original, Totals, report, sentence
from .words import WordUnits

logger = logging.getLogger("fairseq_cli.eval_lm")


_split: Optional[SegmentDataset] = None  # the split that fairseq-eval-lm evaluates


def use_for_eval_lm(split: Optional[SegmentDataset] = None) -> None:
    """Let fairseq-eval-lm evaluate models of this package on *split* with `evaluate`, and others as it does."""
    global _split
    importlib.import_module("fairseq_cli.eval_lm")  # it may have been run as a script only
    _split = split
    for names in names_of("eval_lm"):
        if not hasattr(names.eval_lm, "__wrapped__"):  # not yet
            stand_in(names, "eval_lm")(_eval_lm)


def _eval_lm(
    original: Callable[..., Dict[str, float]], models: Any, source_dictionary: Any, batch_iterator: Any, **options: Any
) -> Dict[str, float]:
    if not all(hasattr(getattr(model, "decoder", None), "streams") for model in models):
        return original(models, source_dictionary, batch_iterator, **options)
    result = evaluate(models, source_dictionary, batch_iterator, split=_split, **options)
    if is_first_rank():
        logger.info("%s", json.dumps({k: v for k, v in result.items() if k not in ("loss", "perplexity")}))
    return result


def evaluate(
    models: List[Any],
    dictionary: Any,
    batches: Iterable[Dict[str, Any]],
    post_process: Optional[str] = None,
    output_word_probs: bool = False,
    output_word_stats: bool = False,
    softmax_batch: int = 0,
    device: Optional[torch.device] = None,
    split: Optional[SegmentDataset] = None,
    **unused: Any,
) -> Dict[str, Any]:
    """Return the mean loss per token or per word of a split, over all streams of all ranks, and its `report`.

    Args:
        models: one, or several whose probabilities are averaged.
        dictionary: the words.
        batches: of consecutive segments, as the task feeds them.
        post_process: fairseq's name of the way to join pieces to words (`words.py`). The loss is then a word's: the sum
            over all tokens divided by the number of words, wherever segments and streams begin. ``</s>`` is a word.
        output_word_probs, output_word_stats: log the words, once everything has been read.
        softmax_batch: score at most this many tokens at once; 0 for a whole batch.
        device: where the models are.
        split: the split that the batches belong to. Its folder has the counts of the original text, for the report.

    Returns:
        The ``loss`` in bits, the ``perplexity``, which is 2 to its power, and the `report`.

    Raises:
        ValueError: as `score_segments`, or nothing was scored.
        DivergenceError: a token has no probability.
    """
    device = next(models[0].parameters()).device if device is None else device
    units = WordUnits.of(post_process, dictionary).to(device)
    original = Original.of(split)
    log = TokenLog() if output_word_probs or output_word_stats else None
    unknown = torch.tensor(sorted({dictionary.unk(), dictionary.index(dictionary.unk_word)}), device=device)
    timer, totals = StopwatchMeter(), Totals()
    for scored in score_segments(models, batches, device, softmax_batch, timer):
        target = scored.target
        of_tokens = units.begun(target, scored.source), target == dictionary.eos(), torch.isin(target, unknown)
        counts = torch.stack([count.sum() for count in of_tokens]).tolist()
        totals += Totals(scored.nll, len(target), *counts)
        if log is not None:
            log.add(scored.position.streams, scored.lengths, target, scored.log_probs)
    totals = totals.over_ranks()
    if totals.tokens == 0:  # only documents leave streams empty
        raise ValueError(
            "no token was scored, as all documents are in other streams: leave this --shard-id out, or pass a smaller "
            "--num-shards"
        )
    speed = totals.tokens / timer.sum if timer.sum > 0 else 0
    logger.info(f"Evaluated {totals.tokens:,} tokens in {timer.sum:.1f}s ({speed:.2f} tokens/s)")
    if log is not None:
        words = list(words_of(*log.whole(), units.to(torch.device("cpu")), dictionary))
        print_words(words, output_word_probs, output_word_stats)
    reported = {**report(totals, original), "tokens_per_second": speed}
    if is_first_rank():
        logger.info("Units: %s", sentence(reported))
    return {"loss": totals.bits(totals.words), "perplexity": totals.perplexity(totals.words), **reported}


def _check_lengths(models: List[Any]) -> None:
    """Refuse models that would read each other's segments, with a loss that depends on their order."""
    lengths = sorted({model.decoder.segment_length for model in models})
    if len(lengths) > 1:
        raise ValueError(
            f"the models of --path were trained with --tokens-per-sample {' and '.join(map(str, lengths))}: pass "
            "--tokens-per-sample, the length of the segments that all of them read"
        )


class ScoredSegment(NamedTuple):
    """The log-probabilities of the tokens of a batch."""

    position: SegmentPosition
    lengths: List[int]  # [B], tokens of each stream
    source: Tensor  # [R], the token before each target
    target: Tensor  # [R]
    log_probs: Tensor  # [R], in nats
    nll: float  # minus their sum


@torch.no_grad()
def score_segments(
    models: List[Any],
    batches: Iterable[Dict[str, Any]],
    device: torch.device,
    softmax_batch: int = 0,
    timer: Optional[StopwatchMeter] = None,
) -> Iterator[ScoredSegment]:
    """Yield the scores of every batch that is not empty; *timer* measures the models' time.

    Raises:
        ValueError: *softmax_batch* is negative, or models divide a text into segments of other lengths.
        DivergenceError: a token has no probability.
    """
    if softmax_batch < 0:
        raise ValueError(f"--softmax-batch is {softmax_batch}: pass a number of tokens, or leave it out")
    _check_lengths(models)
    timer = timer or StopwatchMeter()
    with ExitStack() as unchanged:
        for model in models:
            model.eval()
            unchanged.enter_context(model.decoder.positions.unchanged())
        timer.start()
        for batch, features in _read(models, _on_device(batches, device)):
            inputs = batch["net_input"]
            real = real_tokens(batch["target"], inputs["src_lengths"])
            target = batch["target"][real]
            log_probs = target_log_probs(models, [rows[real] for rows in features], target, softmax_batch)
            nll = -finite_sum(log_probs, inputs["position"])
            timer.stop(len(target))
            source = inputs["src_tokens"][real]
            yield ScoredSegment(inputs["position"], inputs["src_lengths"].tolist(), source, target, log_probs, nll)
            timer.start()


def _on_device(batches: Iterable[Dict[str, Any]], device: torch.device) -> Iterator[Dict[str, Any]]:
    """Yield the batches that are not empty, on the device."""
    for batch in batches:
        if "net_input" in batch:
            yield utils.move_to_cuda(batch, device=device) if device.type == "cuda" else batch


def _read(models: List[Any], batches: Iterable[Dict[str, Any]]) -> Iterator[Tuple[Dict[str, Any], Tuple[Tensor, ...]]]:
    """Yield batches and the features ``[B, N, d]`` of every model, which may read some batches in advance."""
    ours, *theirs = tee(batches, 1 + len(models))
    inputs = ((batch["net_input"] for batch in copy) for copy in theirs)
    read = [model.decoder.read_streams(copy) for model, copy in zip(models, inputs, strict=True)]
    # The features first: a model that reads in advance asks for batches that `tee` then keeps.
    return ((batch, features) for features, batch in zip(zip(*read, strict=True), ours, strict=True))


def target_log_probs(models: List[Any], features: List[Tensor], target: Tensor, at_once: int = 0) -> Tensor:
    """Return natural log-probabilities ``[R]`` of the words ``target [R]``, in float32 or wider.

    Several models, whose *features* ``[R, d]`` are given, yield the logarithm of their mean probability.
    """
    logs = []
    for model, rows in zip(models, features, strict=True):
        blocks = zip(rows.split(at_once or max(1, len(rows))), target.split(at_once or max(1, len(rows))), strict=True)
        logs.append(torch.cat([_log_probs(model, model.decoder.output_layer(r[None]), t) for r, t in blocks]))
    return mean_over_models(logs)


def _log_probs(model: Any, scores: Tensor, target: Tensor) -> Tensor:
    words = target.unsqueeze(0)
    log_probs = model.get_normalized_probs((scores, None), log_probs=True, sample={"target": words})
    return log_probs.gather(2, words.unsqueeze(2)).flatten()


def finite_sum(log_probs: Tensor, position: Any) -> float:
    """Return the sum of a segment's log-probabilities.

    Raises:
        DivergenceError: a token has no probability.
    """
    total = float(log_probs.double().sum())
    if not math.isfinite(total):
        raise DivergenceError(
            f"NaN or infinity in the loss of segment {position.index} of {position.named_streams()} of "
            f"'{position.split}': the weights have diverged, or do not fit into this precision"
        )
    return total
