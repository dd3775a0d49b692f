"""Sampling one token after the other at full speed: no reordering, and on a GPU each step replayed as a graph.

Shapes: B rows, V words.
"""

import math
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..kernels.parts import parts_of
from .found import Found
from .state import DecodingState
from .step import KernelDrawing, kernel_step

# Plain attention reads the cache up to a multiple of this many tokens of the segment: a graph each.
COLUMNS_A_GRAPH = 256

# Words that steps leave on the device before they are collected.
HELD = 256

WARM_UP = 2  # steps before recording, in which kernels are compiled and workspaces allocated

SPARE_MEMORY = 1 / 8  # of the device, that a cache may take between two calls

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


@dataclass(frozen=True)
class Draw:
    """`draw` with its options: a way to choose that on a GPU is part of the step's last kernel."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, log_probs: Tensor) -> Tensor:
        return draw(log_probs, self.temperature, self.top_k, self.top_p)


class Adjustment:
    """What becomes of log-probabilities ``[B, V]`` before a word is drawn and its own is noted.

    Args:
        temperature: they are divided by it and normalised again.
        added: ``[V]`` what is added to them then. It may change in place from step to step.
    """

    def __init__(self, temperature: float = 1.0, added: Optional[Tensor] = None):
        self.temperature, self.added = temperature, added

    def __call__(self, log_probs: Tensor) -> Tensor:
        if self.temperature != 1:
            log_probs = (log_probs / self.temperature).log_softmax(-1)
        return log_probs if self.added is None else log_probs + self.added

    def copy_(self, other: "Adjustment") -> None:
        """Add what *other* adds, in the same tensor."""
        if self.added is not None and other.added is not None:
            self.added.copy_(other.added)


class Sampler:
    """Continues texts that a model has read.

    Args:
        model: a `MemoryLanguageModel` in evaluation mode.
        state: what it has read, without each text's last token. It is read on in place.
        choose: log-probabilities ``[B, V]`` to words ``[B]``, in tensor operations only.
        adjust: what becomes of the model's log-probabilities before.
        graphs: replay steps as CUDA graphs; None does so on a GPU.
        compiled: compile the layers with torch.compile, which takes its time and pays on long texts, unless there
            are kernels for the step.
    """

    def __init__(
        self,
        model: Any,
        state: DecodingState,
        choose: Callable[[Tensor], Tensor] = Draw(),
        graphs: Optional[bool] = None,
        compiled: bool = False,
        adjust: Optional[Adjustment] = None,
    ):
        self.model, self.state, self.choose = model, state, choose
        self.adjust = Adjustment() if adjust is None else adjust
        tokens = state.cache.tokens
        self.words = tokens.new_zeros(len(tokens), 1)
        exact = torch.promote_types(state.cache.keys[0].dtype, torch.float32)
        space = tokens.new_zeros(len(tokens), HELD)
        self.found = Found(space, torch.zeros_like(space, dtype=exact), torch.zeros_like(tokens))
        # A replay would call no hooks.
        self.graphs = (tokens.is_cuda if graphs is None else graphs) and not parts_of(model.decoder).hooked
        self._kernels = kernel_step(state) if self.graphs else None
        self._drawing = self._kernel_drawing()
        if compiled and self._kernels is None:
            state.layer_step = torch.compile(state.layer_step, dynamic=False)
        self._recorded: Dict[int, Any] = {}
        self._refreshes = 0  # of all rows alike, with full memories
        self._refresh: Any = None
        self._signature = parts_of(model.decoder).signature()

    @classmethod
    def take(
        cls, model: Any, state: DecodingState, choose: Callable[[Tensor], Tensor], adjust: Adjustment
    ) -> "Sampler":
        """The one that the model's last call gave back, with its graphs, if it serves; else a new one."""
        if model.decoder.spare_samplers:
            try:
                spare = model.decoder.spare_samplers.pop()
            except IndexError:  # another thread took it
                spare = None
            if type(spare) is cls and spare._serves(state, choose, adjust):
                spare.state.copy_(state)
                spare.adjust.copy_(adjust)
                return spare
            del spare  # its cache may be large
        return cls(model, state, choose, adjust=adjust)

    def give_back(self) -> None:
        """Let the model's next call have the graphs, if there are any; until then the cache stays in memory.

        One that takes much of the device's is let go: the next prompts are read into another beside it.
        """
        cache = self.state.cache
        device = cache.tokens.device
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
        if self._recorded and cache.size() <= SPARE_MEMORY * total:
            self.model.decoder.spare_samplers.append(self)

    def _serves(self, state: DecodingState, choose: Callable[[Tensor], Tensor], adjust: Adjustment) -> bool:
        """Whether graphs for such texts would be the same: weights may have changed, but in place only."""
        mine = (self.choose, self.adjust.temperature, _sizes(self.state), self._signature)
        return mine == (choose, adjust.temperature, _sizes(state), parts_of(self.model.decoder).signature())

    def __call__(self, last: Tensor, count: int) -> Tensor:
        """Generate *count* words after the texts' last tokens ``last [B]``: ``[B, count]``."""
        return self.go_on(last, count).words

    @torch.no_grad()
    def go_on(self, last: Tensor, count: int) -> Continuation:
        """As a call, with the words' log-probabilities."""
        self.words.copy_(last.unsqueeze(1))
        ones = [1] * len(last)
        parts: List[Continuation] = []
        for start in range(0, max(1, count), HELD):
            now = min(HELD, count - start)
            self.found.position.zero_()
            if self._drawing is not None:
                self._drawing.reseed()
            for _ in range(now):
                self._begin_segments(ones)
                self._replay(self._columns())
                self.state.cache.advance(ones, self.state.network, counted=True)
            parts.append(Continuation(self.found.words[:, :now].clone(), self.found.log_probs[:, :now].clone()))
        return Continuation(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))

    def keep(self, rows: Tensor) -> None:
        """Go on with the texts ``rows [b]`` alone; not with graphs."""
        self.state.reorder(rows)
        self.words, self.found = self.words[rows], Found(*(t[rows] for t in self.found))

    def _kernel_drawing(self) -> Optional[KernelDrawing]:
        """Where the step's last kernel can draw, what does so."""
        choose, adjust, decoder = self.choose, self.adjust, self.state.decoder
        if self._kernels is None or not isinstance(choose, Draw) or choose.temperature != 1:
            return None
        if decoder.output is None or decoder.config.vocabulary_size > KernelDrawing.most_words():
            return None
        return KernelDrawing(adjust.temperature, adjust.added, choose.top_k, choose.top_p, self.words)

    def _begin_segments(self, ones: Sequence[int]) -> None:
        state, full = self.state, self.state.mem_len
        places = state.cache.places
        if all(place.open for place in places):
            return
        alike = not any(place.open or place.slots < full for place in places)
        if not (self.graphs and state.cache.replayable and alike):
            state.open(self._embed(), ones)
            return
        self._refreshes += 1
        if self._refreshes == 1:  # compiles kernels
            state.open(self._embed(), ones)
            return
        if self._refresh is None:
            self._refresh = self._record(self._refresh_all, warm_up=0)
        self._refresh.replay()
        state.cache.places = [place._replace(open=True) for place in places]

    def _refresh_all(self) -> None:
        self.state.cache.open(None, self.state.mem_len, self._embed(), self.state.network)

    def _columns(self) -> int:
        """How many columns of the cache this step has to look at."""
        state = self.state
        if self._kernels is not None:  # which see to it themselves
            return state.mem_len + state.length
        read = 1 + max(place.tokens for place in state.cache.places)
        part = -(-read // COLUMNS_A_GRAPH) * COLUMNS_A_GRAPH if self.graphs else read
        return state.mem_len + min(part, state.length)

    def _embed(self) -> Tensor:
        decoder = self.state.decoder
        return decoder.positions.embed(decoder.embed_tokens(self.words), self.state.length - self.state.cache.tokens)

    def _scores(self, end: int) -> Tensor:
        """What the output layer says of the next words: ``[B, 1, V]``, or features."""
        state = self.state
        if self._kernels is not None:
            return self._kernels.scores(self.words)
        if self.graphs:
            features = state.step(self._embed(), 0, end)
        else:
            features = state.step(self._embed(), self._oldest(), end, state.common_column())
        return state.decoder.output_layer(features)

    def _step(self, end: int) -> None:
        """Replace the words by the next ones, and note them."""
        scores = self._scores(end)
        if self._drawing is not None:
            self._drawing(scores[:, 0], self.words, self.state.cache.tokens, self.found)
            return
        log_probs = self.adjust(self.model.get_normalized_probs((scores, None), True)[:, 0])
        words, at = self.choose(log_probs).unsqueeze(1), self.found.position.unsqueeze(1)
        self.words.copy_(words)
        self.found.words.scatter_(1, at, words)
        self.found.log_probs.scatter_(1, at, log_probs.gather(1, words))
        self.found.position.add_(1)
        self.state.cache.tokens.add_(1)

    def _oldest(self) -> int:
        return self.state.mem_len - max(place.slots for place in self.state.cache.places)

    def _replay(self, end: int) -> None:
        if not self.graphs:
            with torch.inference_mode():  # the host has less to note for every operation
                self._step(end)
            return
        if end not in self._recorded:
            self._recorded[end] = self._record(partial(self._step, end))
        self._recorded[end].replay()

    def _record(self, run: Callable[[], None], warm_up: int = WARM_UP) -> Any:
        """*run* as a graph. Trying it out writes what it writes anyway, but for what is put back."""
        changed = (self.words, self.found.position, self.state.cache.tokens)
        with _RECORDING:
            before = [t.clone() for t in changed]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warm_up):
                    run()
                    for tensor, held in zip(changed, before, strict=True):
                        tensor.copy_(held)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
        return graph


def _sizes(state: DecodingState) -> List[Any]:
    cache = state.cache.keys[0]
    return [state.mem_len, state.length, cache.shape, cache.dtype, cache.device]
