"""Sampling one token after the other at full speed: no reordering, and on a GPU each step replayed as a graph.

Shapes: B rows, V words.
"""

from typing import Any, Callable, Dict, Optional, Sequence

import torch
from torch import Tensor

from ..models.incremental import DecodingState
from .step import fastest_step

# Attention reads the cache up to a multiple of this many tokens of the segment: a graph each.
COLUMNS_A_GRAPH = 256


def draw(log_probs: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw a word a row from ``log_probs [B, V]``: ``[B]``.

    Args:
        temperature: 0 takes the most probable word.
        top_k: of the k most probable words only (0: of all).
        top_p: of the fewest words that hold this probability together (1: of all).
    """
    if temperature == 0:
        return log_probs.argmax(-1)
    probs = (log_probs / temperature).softmax(-1)
    if top_k > 0:
        floor = probs.topk(min(top_k, probs.size(-1)), dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < floor, 0)
    if top_p < 1:
        ordered, words = probs.sort(dim=-1, descending=True)
        total = ordered.sum(-1, keepdim=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p * total, 0)
        probs = torch.zeros_like(probs).scatter(-1, words, ordered)
    # The word whose exponential clock rings first; unlike torch.multinomial it never waits for the host.
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


class Sampler:
    """Continues texts that a model has read.

    Args:
        model: a `MemoryLanguageModel` in evaluation mode.
        state: what it has read, without each text's last token. It is read on in place.
        choose: log-probabilities ``[B, V]`` to words ``[B]``, in tensor operations only.
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
    ):
        self.model, self.state, self.choose = model, state, choose
        self.words = state.cache.tokens.new_zeros(len(state.cache.places), 1)
        self.graphs = self.words.is_cuda if graphs is None else graphs
        if self.graphs:
            state.layer_step = fastest_step(state)
        if compiled:
            state.layer_step = torch.compile(state.layer_step, dynamic=False)
        self._recorded: Dict[int, Any] = {}

    @torch.no_grad()
    def __call__(self, last: Tensor, count: int) -> Tensor:
        """Generate *count* words after the texts' last tokens ``last [B]``: ``[B, count]``."""
        self.words.copy_(last.unsqueeze(1))
        found = self.words.new_empty(len(last), count)
        ones = [1] * len(last)
        for i in range(count):
            self._begin_segments(ones)
            self._replay(self._columns())
            self._advance(ones)
            found[:, i] = self.words[:, 0]
        return found

    def _begin_segments(self, ones: Sequence[int]) -> None:
        if not all(place.open for place in self.state.cache.places):
            self.state.open(self._embed(), ones)

    def _columns(self) -> int:
        """How many columns of the cache this step has to look at."""
        state = self.state
        read = 1 + max(place.tokens for place in state.cache.places)
        part = -(-read // COLUMNS_A_GRAPH) * COLUMNS_A_GRAPH if self.graphs else read
        return state.mem_len + min(part, state.length)

    def _advance(self, ones: Sequence[int]) -> None:
        """As the cache's `advance`; within a segment the host need not tell the device anything."""
        cache = self.state.cache
        if any(place.tokens + 1 == self.state.length for place in cache.places):
            cache.advance(ones, self.state.network)
        else:
            cache.places = [place._replace(tokens=place.tokens + 1) for place in cache.places]
            cache.tokens.add_(1)

    def _embed(self) -> Tensor:
        decoder = self.state.decoder
        return decoder.positions.embed(decoder.embed_tokens(self.words), self.state.length - self.state.cache.tokens)

    def _next(self, end: int) -> Tensor:
        features = self.state.step(self._embed(), 0 if self.graphs else self._oldest(), end)
        scores = self.state.decoder.output_layer(features)
        return self.choose(self.model.get_normalized_probs((scores, None), True)[:, 0])

    def _oldest(self) -> int:
        return self.state.mem_len - max(place.slots for place in self.state.cache.places)

    def _replay(self, end: int) -> None:
        if not self.graphs:
            self.words.copy_(self._next(end).unsqueeze(1))
            return
        if end not in self._recorded:
            self._recorded[end] = self._record(end)
        self._recorded[end].replay()

    def _record(self, end: int) -> Any:
        """The step as a graph. Trying it out writes what the step writes anyway, but for the words."""
        words = self.words.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._next(end)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.words.copy_(self._next(end).unsqueeze(1))
        self.words.copy_(words)
        return graph
