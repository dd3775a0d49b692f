"""Sampling one token after the other at full speed: no reordering, and on a GPU each step replayed as a graph.

Shapes: B rows, V words.
"""

import math
import threading
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..models.incremental import DecodingState
from .step import fastest_step

# Attention reads the cache up to a multiple of this many tokens of the segment: a graph each.
COLUMNS_A_GRAPH = 256

# Threads that sample at the same time share the random number generator, which can belong to one recording only.
_RECORDING = threading.Lock()


class Continuation(NamedTuple):
    """What a `Sampler` has generated."""

    words: Tensor  # [B, n]
    log_probs: Tensor  # [B, n], of those words, float32 or wider


def truncated(log_probs: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tuple[Tensor, Optional[Tensor]]:
    """Of ``log_probs [B, V]`` those of the top words, as `draw` takes them.

    Returns:
        ``[B, n]``, -inf where a word is left out, and which words they are; None for words 0 to V-1.
    """
    words = None
    if top_k > 0:
        log_probs, words = log_probs.topk(min(top_k, log_probs.size(-1)), dim=-1)
    if top_p < 1:
        if words is None:
            log_probs, words = log_probs.sort(dim=-1, descending=True)
        held = log_probs.exp().cumsum(-1)
        log_probs[:, 1:].masked_fill_(held[:, :-1] >= top_p, -math.inf)
    return log_probs, words


def draw(log_probs: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw a word a row from ``log_probs [B, V]``: ``[B]``.

    Args:
        log_probs: where their probabilities do not add up to 1, words are drawn in proportion.
        temperature: 0 takes the most probable word.
        top_k: of the k most probable words only (0: of all).
        top_p: of the fewest words that hold this probability together (1: of all).
    """
    if temperature == 0:
        return log_probs.argmax(-1)
    if temperature != 1:
        log_probs = (log_probs / temperature).log_softmax(-1)
    log_probs, words = truncated(log_probs, top_k, top_p)
    # The word whose exponential clock rings first; unlike torch.multinomial it never waits for the host.
    drawn = (log_probs - torch.empty_like(log_probs).exponential_().log_()).argmax(-1)
    return drawn if words is None else words.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def unchanged(log_probs: Tensor) -> Tensor:
    return log_probs


class Sampler:
    """Continues texts that a model has read.

    Args:
        model: a `MemoryLanguageModel` in evaluation mode.
        state: what it has read, without each text's last token. It is read on in place.
        choose: log-probabilities ``[B, V]`` to words ``[B]``, in tensor operations only.
        adjust: what becomes of the model's log-probabilities before a word is chosen and its own is noted, likewise.
        graphs: replay steps as CUDA graphs; None does so on a GPU.
        compiled: compile the layers with torch.compile, which takes its time and pays on long texts.
    """

    def __init__(
        self,
        model: Any,
        state: DecodingState,
        choose: Callable[[Tensor], Tensor] = draw,
        graphs: Optional[bool] = None,
        compiled: bool = False,
        adjust: Callable[[Tensor], Tensor] = unchanged,
    ):
        self.model, self.state, self.choose, self.adjust = model, state, choose, adjust
        self.words = state.cache.tokens.new_zeros(len(state.cache.places), 1)
        exact = torch.promote_types(state.cache.keys[0].dtype, torch.float32)
        self.log_probs = torch.zeros_like(self.words, dtype=exact)
        self.graphs = self.words.is_cuda if graphs is None else graphs
        if self.graphs:
            state.layer_step = fastest_step(state)
        if compiled:
            state.layer_step = torch.compile(state.layer_step, dynamic=False)
        self._recorded: Dict[int, Any] = {}

    def __call__(self, last: Tensor, count: int) -> Tensor:
        """Generate *count* words after the texts' last tokens ``last [B]``: ``[B, count]``."""
        return self.go_on(last, count).words

    @torch.no_grad()
    def go_on(self, last: Tensor, count: int) -> Continuation:
        """As a call, with the words' log-probabilities."""
        self.words.copy_(last.unsqueeze(1))
        words = self.words.new_empty(len(last), count)
        log_probs = self.log_probs.new_empty(len(last), count)
        ones = [1] * len(last)
        for i in range(count):
            self._begin_segments(ones)
            self._replay(self._columns())
            self.state.cache.advance(ones, self.state.network)
            words[:, i] = self.words[:, 0]
            log_probs[:, i] = self.log_probs[:, 0]
        return Continuation(words, log_probs)

    def keep(self, rows: Tensor) -> None:
        """Go on with the texts ``rows [b]`` alone."""
        self.state.reorder(rows)
        self.words, self.log_probs = self.words[rows], self.log_probs[rows]
        self._recorded.clear()

    def _begin_segments(self, ones: Sequence[int]) -> None:
        if not all(place.open for place in self.state.cache.places):
            self.state.open(self._embed(), ones)

    def _columns(self) -> int:
        """How many columns of the cache this step has to look at."""
        state = self.state
        read = 1 + max(place.tokens for place in state.cache.places)
        part = -(-read // COLUMNS_A_GRAPH) * COLUMNS_A_GRAPH if self.graphs else read
        return state.mem_len + min(part, state.length)

    def _embed(self) -> Tensor:
        decoder = self.state.decoder
        return decoder.positions.embed(decoder.embed_tokens(self.words), self.state.length - self.state.cache.tokens)

    def _next(self, end: int) -> Tuple[Tensor, Tensor]:
        """The next words ``[B, 1]`` and their log-probabilities."""
        state = self.state
        if self.graphs:
            features = state.step(self._embed(), 0, end)
        else:
            features = state.step(self._embed(), self._oldest(), end, state.common_column())
        scores = self.state.decoder.output_layer(features)
        log_probs = self.adjust(self.model.get_normalized_probs((scores, None), True)[:, 0])
        words = self.choose(log_probs).unsqueeze(1)
        return words, log_probs.gather(1, words)

    def _step(self, end: int) -> None:
        words, log_probs = self._next(end)
        self.words.copy_(words)
        self.log_probs.copy_(log_probs)

    def _oldest(self) -> int:
        return self.state.mem_len - max(place.slots for place in self.state.cache.places)

    def _replay(self, end: int) -> None:
        if not self.graphs:
            with torch.inference_mode():  # the host has less to note for every operation
                self._step(end)
            return
        if end not in self._recorded:
            self._recorded[end] = self._record(end)
        self._recorded[end].replay()

    def _record(self, end: int) -> Any:
        """The step as a graph. Trying it out writes what the step writes anyway, but for the words."""
        with _RECORDING:
            words = self.words.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._next(end)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(end)
            self.words.copy_(words)
        return graph
