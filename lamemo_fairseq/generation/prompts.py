"""Texts to continue or to score, as fairseq's generator and scorer are given them."""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils
from torch import Tensor

from ..data.dictionary import NO_WORD


class PromptDataset(FairseqDataset):
    """Each text after an end-of-sentence token, on its own.

    Texts have any length, and end-of-sentence tokens anywhere in them. An end-of-sentence token at the very end is left
    out: fairseq's dictionaries add it to a line.

    Args:
        texts: word ids, one tensor a text.
        dictionary: the words.
        with_end: whether an end-of-sentence token after each text is among the targets.
    """

    def __init__(self, texts: Sequence[Tensor], dictionary: Dictionary, with_end: bool = False):
        super().__init__()
        self.with_end = with_end
        self.shard = slice(None)
        self.texts = texts
        self.eos = dictionary.eos()
        self.sizes = np.array([len(self._text(i)) + 1 for i in range(len(texts))], dtype=np.int64)

    def take_shard(self, shards: int, shard: int, name: str) -> None:
        """Let batches be formed of one of *shards* equal parts of the texts; each keeps its number.

        Raises:
            ValueError: there are fewer texts than shards.
        """
        if shards > len(self.texts):
            raise ValueError(
                f"{name} has {len(self.texts)} lines, fewer than --num-shards {shards}: pass a smaller one"
            )
        self.shard = slice(shard, None, shards)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        text = self._text(index)
        return {"id": index, "source": torch.cat([text.new_tensor([self.eos]), text])}

    def collater(self, samples: List[Dict[str, Any]], pad_to_length: Optional[int] = None) -> Dict[str, Any]:
        """Collate a batch: ``src_tokens [B, L]``, and as targets the same without the first token.

        Both are padded with `NO_WORD` on the right.
        """
        if not samples:
            return {}
        source = data_utils.collate_tokens([s["source"] for s in samples], NO_WORD, pad_to_length=pad_to_length)
        lengths = torch.tensor([len(s["source"]) for s in samples])
        target = targets_of(source)
        if self.with_end:
            target[torch.arange(len(source)), lengths - 1] = self.eos
        return {
            "id": torch.tensor([s["id"] for s in samples]),
            "nsentences": len(samples),
            "ntokens": int(target.ne(NO_WORD).sum()),
            "net_input": {"src_tokens": source, "src_lengths": lengths},
            "target": target,
        }

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def ordered_indices(self) -> Any:
        """Return the texts with similar lengths together, the longest first: a text that does not fit fails at once."""
        return np.argsort(-self.sizes, kind="stable")[self.shard]

    def _text(self, index: int) -> Tensor:
        text = torch.as_tensor(self.texts[index]).long()
        return text[:-1] if len(text) > 0 and text[-1] == self.eos else text


def targets_of(source: Tensor) -> Tensor:
    """Return the word after each of ``source [B, L]``, and `NO_WORD` after the last."""
    return torch.cat([source[:, 1:], source.new_full((len(source), 1), NO_WORD)], dim=1)
