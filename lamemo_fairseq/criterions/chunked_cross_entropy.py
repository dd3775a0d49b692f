"""fairseq's cross-entropy, computed so that no score is held for every token and every word."""

from typing import Any, Dict, Tuple

from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from torch import Tensor


@register_criterion("chunked_cross_entropy", dataclass=CrossEntropyCriterionConfig)
class ChunkedCrossEntropyCriterion(CrossEntropyCriterion):
    """A criterion with the same loss and gradients as ``cross_entropy``, for full and adaptive softmaxes.

    The loss is computed inside the model's forward, so that any data-parallel wrapper sees all of it.
    """

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, int, Dict[str, Any]]:
        """Return the loss summed over the tokens, the number to divide it by, and the values to log.

        Raises:
            NotImplementedError: losses of single tokens are asked for.
        """
        if not reduce:
            raise NotImplementedError(
                "--criterion chunked_cross_entropy only sums losses: pass --criterion cross_entropy"
            )
        loss, _ = model(**sample["net_input"], target=sample["target"])
        streams = sample["target"].size(0)
        sample_size = streams if self.sentence_avg else sample["ntokens"]
        logged = {"loss": loss.data, "ntokens": sample["ntokens"], "nsentences": streams, "sample_size": sample_size}
        return loss, sample_size, logged
