"""The options of the task."""

from dataclasses import dataclass, field, fields
from typing import List, Optional

from fairseq.data.indexed_dataset import get_available_dataset_impl
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ..core.config import refuse_names


@dataclass
class SegmentLanguageModelingConfig(FairseqDataclass):
    data: Optional[str] = field(default=None, metadata={"help": "folder with the output of fairseq-preprocess"})
    tokens_per_sample: Optional[int] = field(
        default=None, metadata={"help": "segment length N (in evaluation the default is the trained one)"}
    )
    roll: bool = field(
        default=False,
        metadata={
            "help": "rotate every training stream by a random offset in each epoch; with documents, change their order"
        },
    )
    documents: ChoiceEnum(["none", "recorded", "separator"]) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "read splits as documents, recorded in the data folder or separated by a line (docs/documents.md)"
        },
    )
    document_separator: str = field(
        default="", metadata={"help": "the line between two documents, in words of the dictionary (an empty line)"}
    )
    score_separators: bool = field(
        default=False, metadata={"help": "read and score separators as the last line of a document, not leave them out"}
    )
    at_document: ChoiceEnum(["clear", "keep"]) = field(  # type: ignore[valid-type]
        default="clear", metadata={"help": "clear or keep the memory where a document begins"}
    )
    seed: int = II("common.seed")
    dataset_impl: Optional[ChoiceEnum(get_available_dataset_impl())] = II(  # type: ignore[valid-type]
        "dataset.dataset_impl"
    )
    train_subset: str = II("dataset.train_subset")
    update_freq: List[int] = II("optimization.update_freq")
    input: str = II("interactive.input")
    num_shards: int = II("dataset.num_shards")
    shard_id: int = II("dataset.shard_id")
    post_process: Optional[str] = II("common_eval.post_process")


refuse_names([f.name for f in fields(SegmentLanguageModelingConfig)], "an option of fairseq or of this package")
