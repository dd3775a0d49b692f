"""A cache for transformers, whose single layer has the memory of the whole model and the position of each text.

Shapes: B sequences, L columns of input, L' of them new.
"""

import copy
from typing import Any, Dict, List, NoReturn, Optional, Tuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..core import LanguageModel
from ..core.decoding.state import DecodingState

_FACTOR = 6364136223846793005  # odd, so that every earlier column counts


class TextLayer(CacheLayerMixin):
    """The state of B sequences in all layers of a model: slots, unfinished segments, and positions."""

    supports_early_init = False  # of keys and values, which live in the state

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model
        self.state: Optional[DecodingState] = None
        self.columns = 0  # L, read so far, with padding; transformers takes it for the length
        self.digest: Optional[Tensor] = None  # [B] int64, of the ids in them

    def read(self, tokens: Tensor, counts: List[int], input_ids: Tensor) -> Tensor:
        """Read ``tokens [B, k]``, of sequence b the first ``counts[b]``: features ``[B, k, d]``.

        Args:
            tokens: word ids.
            counts: words of each sequence.
            input_ids: ``[B, L']``, of which they are the words.

        Raises:
            ValueError: there are fewer or more sequences than before.
        """
        if self.state is None:
            self.state = DecodingState(self.model, len(tokens))
            self.is_initialized = True
        if len(tokens) != self.batch_size:
            raise ValueError(
                f"the cache has {self.batch_size} sequences, and the input {len(tokens)}: pass a new cache"
            )
        self.columns, self.digest = self.columns + input_ids.size(1), _digest(input_ids, self.digest)
        if tokens.size(1) == 0:  # all columns are padding
            return self.model.embed_tokens.table(0).new_empty(len(tokens), 0, self.model.config.decoder_embed_dim)
        return self.state.read(tokens, counts)

    def check_begun(self, input_ids: Tensor) -> None:
        """Check that whole texts ``[B, L]`` begin with the columns read so far, padding included.

        Raises:
            ValueError: they end with these columns or before, or have other ids in them.
        """
        if self.digest is None or len(input_ids) != len(self.digest):  # `read` refuses other numbers of texts
            return
        begun = _digest(input_ids[:, : self.columns])
        if input_ids.size(1) <= self.columns or not torch.equal(begun, self.digest.to(begun.device)):
            raise ValueError(
                f"the cache has read {self.columns} columns, and input_ids {list(input_ids.shape)} do not go on after "
                "them: pass the whole texts, with at least one word that is new"
            )

    def __deepcopy__(self, memo: Dict[int, Any]) -> "TextLayer":
        """Return a copy of the state, for the same model."""
        for part in (*self.model.modules(), *self.model.parameters(), *self.model.buffers()):
            memo.setdefault(id(part), part)
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    @property
    def batch_size(self) -> int:
        """The number of sequences, -1 before the first input."""
        return -1 if self.state is None else len(self.state.cache.positions)

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> Tuple[int, int]:
        return self.columns + query_length, 0

    def reset(self) -> None:
        self.state, self.columns, self.digest, self.is_initialized = None, 0, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None and self.digest is not None:
            self.state.reorder(beam_idx.to(self.state.cache.tokens.device))
            self.digest = self.digest[beam_idx.to(self.digest.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a memory does not go back: read the text again up to where it should end")

    def offload(self) -> None:
        self._refuse()

    def prefetch(self) -> None:
        self._refuse()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._refuse()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> Tuple[Tensor, Tensor]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError("this cache holds the memory of a model as a whole: its layers are neither updated nor moved")


class LamemoCache(Cache):
    """The memory of B sequences. Make one cache, and pass it with every piece of a long text.

    Args:
        model: a model of the core, or the transformers model around it.
    """

    def __init__(self, model: torch.nn.Module):
        core = model if isinstance(model, LanguageModel) else model.model
        assert isinstance(core, LanguageModel)
        self.text = TextLayer(core)
        super().__init__(layers=[self.text])


def _digest(ids: Tensor, before: Optional[Tensor] = None) -> Tensor:
    """Return a number ``[B]`` for each row of ids ``[B, L]``, behind columns whose number is *before*.

    It is a polynomial in `_FACTOR` modulo 2^64, with the ids as coefficients: of other texts it is another one, but for
    a chance that does not matter.
    """
    powers = torch.full_like(ids[0], _FACTOR, dtype=torch.int64).cumprod(0)
    own = (ids * powers.flip(0)).sum(1)
    return own if before is None else own + before.to(own.device) * powers[-1]
