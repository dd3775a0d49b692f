"""The loss per token in the log of a run that averages over streams, ``--sentence-avg``."""

import math
from typing import Any, Dict, List

from fairseq import utils
from fairseq.logging import metrics


def log_loss_per_token(logged: List[Dict[str, Any]], criterion: Any) -> None:
    """Log the loss per token of a batch that fairseq's criterion leaves out; to be called before the criterion logs.

    fairseq tells the two averages apart by their counts, which are equal in a last segment of one token a stream.
    """
    tokens, size = (sum(values.get(name, 0) for values in logged) for name in ("ntokens", "sample_size"))
    if not getattr(criterion, "sentence_avg", False) or tokens != size or any("nll_loss" in v for v in logged):
        return
    loss = sum(values.get("loss", 0) for values in logged)
    metrics.log_scalar("nll_loss", loss / tokens / math.log(2), tokens, round=3)
    metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
