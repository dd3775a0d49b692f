"""Sampling one token after the other at full speed: no reordering, and on a GPU each step replayed as a graph.

Shapes: B sequences, V words, n new words.
"""

import math
import threading
from collections import deque
from functools import partial
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from ..kernels.module_tree import tree_of
from .drawing import Adjustment, Draw
from .drawn import Drawn
from .interfaces import Decoder, module_of
from .state import DecodingState
from .step import KernelDrawing, kernel_step

# Plain attention reads the cache up to a multiple of this many tokens of the segment; each multiple has a graph.
COLUMNS_A_GRAPH = 256

# Words that steps leave on the device before they are collected.
BUFFERED_WORDS = 256

WARM_UP = 2  # steps before recording, in which kernels are compiled and workspaces allocated

SPARE_MEMORY = 1 / 8  # share of the device's memory that a cache may occupy between two calls

# Threads that sample at the same time share the random number generator, which can belong to one recording only.
_RECORDING = threading.Lock()

Choose = Callable[[Tensor], Tensor]
DRAW = Draw()


class Continuation(NamedTuple):
    """New words after texts."""

    words: Tensor  # [B, n]
    log_probs: Tensor  # [B, n], of those words, float32 or wider


class Replayable(Protocol):
    """A recorded CUDA graph."""

    def replay(self) -> None: ...


class Sampler:
    """Continues texts that a model has read.

    Args:
        state: the texts without each one's last token. The sampler changes it in place.
        choose: log-probabilities ``[B, V]`` to words ``[B]``, in tensor operations only.
        adjust: changes the model's log-probabilities before that.
        graphs: replay steps as CUDA graphs; None does so on a GPU.
        compiled: compile the layers with torch.compile, if there are no kernels for the step. Compilation takes
            time, and pays on long texts.
    """

    def __init__(
        self,
        state: DecodingState,
        choose: Choose = DRAW,
        graphs: Optional[bool] = None,
        compiled: bool = False,
        adjust: Optional[Adjustment] = None,
    ):
        self.state, self.choose = state, choose
        self.adjust = Adjustment() if adjust is None else adjust
        tokens, tree = state.cache.tokens, tree_of(module_of(state.decoder))
        self.words = tokens.new_zeros(len(tokens), 1)
        self.drawn = _empty_buffer(state)
        # A replay would not call hooks.
        self.graphs = (tokens.is_cuda if graphs is None else graphs) and not tree.hooked
        self._kernels = kernel_step(state) if self.graphs else None
        self._drawing = self._kernel_drawing()
        if compiled and self._kernels is None:
            state.layer_step = torch.compile(state.layer_step, dynamic=False)
        self._recorded: Dict[int, Replayable] = {}
        self._refreshes = 0  # of all sequences alike, with full memories
        self._refresh: Optional[Replayable] = None
        self._signature = tree.signature()

    @classmethod
    def take(cls, state: DecodingState, choose: Choose, adjust: Adjustment) -> "Sampler":
        """Return the sampler of the model's last call, with its graphs, if it fits these texts; else a new one."""
        try:
            spare = _spares(state.decoder).pop()
        except IndexError:  # there is none, or another thread took it
            spare = None
        if type(spare) is cls and spare.serves(state, choose, adjust):
            spare.state.copy_(state)
            spare.adjust.copy_(adjust)
            return spare
        del spare  # its cache may be large
        return cls(state, choose, adjust=adjust)

    def give_back(self) -> None:
        """Let the model's next call have the graphs, if there are any; until then the cache stays in memory.

        A cache that takes much of the device's memory is freed: the next prompts are read into another beside it.
        """
        cache = self.state.cache
        device = cache.tokens.device
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
        if self._recorded and cache.size() <= SPARE_MEMORY * total:
            _spares(self.state.decoder).append(self)

    def serves(self, state: DecodingState, choose: Choose, adjust: Adjustment) -> bool:
        """Return whether graphs for such texts would be the same: weights may have changed, but in place only."""
        mine = (self.choose, self.adjust.temperature, _sizes(self.state), self._signature)
        signature = tree_of(module_of(state.decoder)).signature()
        return mine == (choose, adjust.temperature, _sizes(state), signature)

    def __call__(self, last: Tensor, count: int) -> Tensor:
        """Generate *count* words after the texts' last tokens ``last [B]``: ``[B, count]``."""
        return self.go_on(last, count).words

    @torch.no_grad()
    def go_on(self, last: Tensor, count: int) -> Continuation:
        """Generate words as `__call__` does, with their log-probabilities."""
        self.words.copy_(last.unsqueeze(1))
        ones = [1] * len(last)
        continuations: List[Continuation] = []
        for start in range(0, max(1, count), BUFFERED_WORDS):
            now = min(BUFFERED_WORDS, count - start)
            self.drawn.position.zero_()
            if self._drawing is not None:
                self._drawing.reseed()
            for _ in range(now):
                self._begin_segments(ones)
                self._replay(self._columns())
                self.state.cache.advance(ones, self.state.network, counted=True)
            continuations.append(Continuation(self.drawn.words[:, :now].clone(), self.drawn.log_probs[:, :now].clone()))
        return Continuation(*(torch.cat(tensors, dim=1) for tensors in zip(*continuations, strict=True)))

    def keep(self, sequences: Tensor) -> None:
        """Go on with *sequences* ``[b]`` alone; not possible with graphs."""
        self.state.reorder(sequences)
        self.words, self.drawn = self.words[sequences], Drawn(*(t[sequences] for t in self.drawn))

    def _kernel_drawing(self) -> Optional[KernelDrawing]:
        """Return how the step's last kernel draws, None if it cannot draw as the options ask."""
        choose, adjust, decoder = self.choose, self.adjust, self.state.decoder
        if self._kernels is None or not isinstance(choose, Draw) or choose.temperature != 1:
            return None
        if decoder.output is None or decoder.config.vocabulary_size > KernelDrawing.most_words():
            return None
        return KernelDrawing(adjust.temperature, adjust.added, choose.top_k, choose.top_p, self.words)

    def _begin_segments(self, ones: Sequence[int]) -> None:
        state, full = self.state, self.state.mem_len
        positions = state.cache.positions
        if all(position.ready for position in positions):
            return
        alike = not any(position.ready or position.slots < full for position in positions)
        if not (self.graphs and state.cache.replayable and alike):
            state.refresh(self._embed(), ones)
            return
        self._refreshes += 1
        if self._refreshes == 1:  # compiles kernels
            state.refresh(self._embed(), ones)
            return
        if self._refresh is None:
            self._refresh = self._record(self._refresh_all, warm_up=0)
        self._refresh.replay()
        state.cache.positions = [position._replace(ready=True) for position in positions]

    def _refresh_all(self) -> None:
        self.state.cache.refresh(None, self.state.mem_len, self._embed(), self.state.network)

    def _columns(self) -> int:
        """Return how many columns of the cache this step has to look at."""
        state = self.state
        if self._kernels is not None:  # the kernels choose the columns themselves
            return state.mem_len + state.length
        read = 1 + max(position.tokens for position in state.cache.positions)
        tokens = -(-read // COLUMNS_A_GRAPH) * COLUMNS_A_GRAPH if self.graphs else read
        return state.mem_len + min(tokens, state.length)

    def _embed(self) -> Tensor:
        return self.state.embed(self.words)

    def _log_probs(self, end: int) -> Tensor:
        """Return log-probabilities ``[B, V]`` of the next words."""
        state = self.state
        if self._kernels is not None and state.decoder.output is not None:
            return self._kernels.scores(self.words)[:, 0].log_softmax(-1)  # of float32
        if self._kernels is not None:
            features = self._kernels(self.words)
        elif self.graphs:
            features = state.step(self._embed(), 0, end)
        else:
            features = state.step(self._embed(), self._oldest(), end, state.common_column())
        return state.decoder.log_probs(features)[:, 0]

    def _step(self, end: int) -> None:
        """Replace the words by the next ones, and store them."""
        if self._drawing is not None and self._kernels is not None:
            scores = self._kernels.scores(self.words)[:, 0]
            self._drawing(scores, self.words, self.state.cache.tokens, self.drawn)
            return
        log_probs = self.adjust(self._log_probs(end))
        words, at = self.choose(log_probs).unsqueeze(1), self.drawn.position.unsqueeze(1)
        self.words.copy_(words)
        self.drawn.words.scatter_(1, at, words)
        self.drawn.log_probs.scatter_(1, at, log_probs.gather(1, words))
        self.drawn.position.add_(1)
        self.state.cache.tokens.add_(1)

    def _oldest(self) -> int:
        return self.state.mem_len - max(position.slots for position in self.state.cache.positions)

    def _replay(self, end: int) -> None:
        if not self.graphs:
            with torch.inference_mode():  # the host has less to do for every operation
                self._step(end)
            return
        if end not in self._recorded:
            self._recorded[end] = self._record(partial(self._step, end))
        self._recorded[end].replay()

    def _record(self, run: Callable[[], None], warm_up: int = WARM_UP) -> Replayable:
        """Return *run* as a graph. The warm-up's writes are undone or overwritten."""
        changed = (self.words, self.drawn.position, self.state.cache.tokens)
        with _RECORDING:
            before = [t.clone() for t in changed]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(warm_up):
                    run()
                    for tensor, saved in zip(changed, before, strict=True):
                        tensor.copy_(saved)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
        return graph


class _Spares(deque[Sampler]):
    """The last returned sampler, for the next call; copied and stored models begin without one."""

    def __reduce__(self) -> Tuple[Any, ...]:
        return (_Spares, ((), 1))


def _spares(decoder: Decoder) -> Deque[Sampler]:
    attributes = vars(decoder)
    spares: Deque[Sampler] = attributes.setdefault("_spare_samplers", _Spares(maxlen=1))
    return spares


def _empty_buffer(state: DecodingState) -> Drawn:
    batch_size = len(state.cache.tokens)
    words = state.cache.tokens.new_zeros(batch_size, BUFFERED_WORDS)
    exact = torch.promote_types(state.cache.layers[0].keys.dtype, torch.float32)
    return Drawn(words, torch.zeros_like(words, dtype=exact), torch.zeros_like(state.cache.tokens))


def _sizes(state: DecodingState) -> Tuple[object, ...]:
    keys = state.cache.layers[0].keys
    return (state.mem_len, state.length, keys.shape, keys.dtype, keys.device)
