"""Models and a split, opened for this package's own commands of evaluation and analysis."""

import os
from dataclasses import dataclass
from typing import Any, List, Optional

import torch
from fairseq import checkpoint_utils

from ..core.names import missing_checkpoint
from ..data.binarized import paths_of
from ..data.folders import data_folders
from ..data.segments import SegmentDataset
from ..host.configuration import read_ours
from ..host.restoring import opening

MAX_TOKENS = 36000  # of fairseq-eval-lm


@dataclass(frozen=True)
class Opened:
    """Models in evaluation mode and the batches that they read."""

    models: List[Any]
    dictionary: Any
    split: SegmentDataset
    batches: Any  # fairseq's iterator over segments
    num_streams: int
    device: torch.device


def open_split(
    data: str,
    paths: List[str],
    subset: str,
    batch_size: Optional[int] = None,
    cpu: bool = False,
    fp16: bool = False,
    documents: str = "none",
    **overrides: Any,
) -> Opened:
    """Load checkpoints and a split, which is cut into streams as fairseq-eval-lm cuts it.

    Args:
        batch_size: number of streams.
        cpu: whether to compute on the CPU even if there is a GPU.
        fp16: whether to compute in half precision.
        documents: the task's option, whatever the checkpoint was trained with.
        overrides: options of the model or of the task in place of the checkpoint's, None for none.

    Raises:
        FileNotFoundError: there is no such checkpoint or split, or no documents are recorded.
        ValueError: a checkpoint is not one of this package, or the number of streams makes no sense.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}, it must be at least 1")
    given = {
        "data": data,
        "documents": documents,
        **{name: value for name, value in overrides.items() if value is not None},
    }
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(missing_checkpoint(path))
        read_ours(path)
    paths_of(data_folders(data)[0], subset, combine=False, choice="with --subset")
    with opening():
        models, _, task = checkpoint_utils.load_model_ensemble_and_task(paths, arg_overrides=given)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    models = [(model.half() if fp16 else model).to(device).eval() for model in models]
    split = task.load_dataset(subset)
    epoch = task.get_batch_iterator(split, max_tokens=MAX_TOKENS, max_sentences=batch_size, as_streams=True)
    batches, num_streams = epoch.next_epoch_itr(shuffle=False), epoch.layout.num_streams
    return Opened(models, task.target_dictionary, split, batches, num_streams, device)
