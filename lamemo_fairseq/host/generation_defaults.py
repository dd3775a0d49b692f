"""Defaults of fairseq-generate and fairseq-interactive that differ from those for a translation model."""

from argparse import Namespace
from typing import Any, Sequence

from fairseq.dataclass import FairseqDataclass
from fairseq.scoring import BaseScorer, register_scorer

from .own import TASK
from .ranks import launched_ranks

NO_SCORE = "no_score"


@register_scorer(NO_SCORE, dataclass=FairseqDataclass)
class NoScore(BaseScorer):
    """Replaces BLEU, which compares a continuation with the line that it begins with."""

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.lines = 0

    def add_string(self, ref: str, pred: str) -> None:
        self.lines += 1

    def score(self) -> float:
        return float("nan")

    def result_string(self) -> str:
        return f"{self.lines:,} lines, without a score (--scoring computes one against the lines themselves)"


def adapt_generation(namespace: Namespace, words: Sequence[str]) -> None:
    """Change the defaults of a command that generates with this package's task, unless *words* name the options.

    No BLEU is computed, and one process runs. fairseq starts as many processes as there are GPUs. fairseq-generate
    would then continue one share of the lines alone, and each process of fairseq-interactive would read the same input.

    Raises:
        ValueError: torchrun has started several processes, which these commands do not divide the work among.
    """
    if getattr(namespace, "task", None) != TASK or not hasattr(namespace, "beam"):
        return
    ranks = launched_ranks()
    if ranks > 1:
        raise ValueError(
            f"torchrun has started {ranks} processes, but one generates: start the command without torchrun, or "
            f"fairseq-generate {ranks} times with --num-shards {ranks} and --shard-id 0 to {ranks - 1}"
        )
    given = {word.split("=", 1)[0] for word in words}
    if "--scoring" not in given:
        namespace.scoring = NO_SCORE
    if not given & {"--distributed-world-size", "--distributed-rank", "--distributed-init-method"}:
        namespace.distributed_world_size = 1
