"""A language model for Python: built from a configuration, saved to a folder, loaded from it.

Shapes: B texts, T words of one, n new words.
"""

from collections import deque
from pathlib import Path
from typing import Deque, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union, overload

import torch
from torch import Tensor, nn

from .decoder import MemoryDecoder
from .decoding.drawing import Draw
from .decoding.sampler import Continuation
from .folder import load_tokenizer, load_weights, read_saved, write_folder
from .memory import MemoryState, Passage
from .memory.documents import DocumentStreams, Extract
from .memory.groups import GroupedState, count_streams
from .names import with_nearest_names
from .reader import Reader, Score, Text, Token, check_known, check_segment, listed, word_ids
from .segments import Piece
from .text import END, Tokenizer

Strings = TypeVar("Strings", str, List[str])


class LanguageModel(MemoryDecoder):
    """A language model with memory, which passes its memory in and out as a value.

    Example::

        model = LanguageModel(ModelConfig(vocabulary_size=1000, segment_length=150))
        features, state, losses = model(tokens, state)
        loss = model.loss(features, target) / target.numel() + sum(losses.values())
    """

    tokenizer: Optional[Tokenizer] = None  # for texts that are strings
    _layers_of_state: Optional[Dict[str, int]] = None  # of a state's tuples, once a state has been given

    def forward(self, tokens: Tensor, state: Optional[MemoryState] = None, lengths: Optional[Tensor] = None) -> Passage:
        """Read one segment; arguments and result as for `read`.

        Raises:
            ValueError: the tokens are no segment of word ids, or the state is of other streams or of another memory.
                Word ids are checked on a CPU alone: on a GPU, the host would wait for the answer.
        """
        check_segment(tokens)
        if lengths is not None and lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"lengths are {list(lengths.shape)}, and the segment {list(tokens.shape)}: pass one a stream"
            )
        if tokens.device.type == "cpu":
            check_known(self, tokens, "the segment has")
        if state is not None:
            self._check_state(state, len(tokens))
        return self.read(tokens, state, lengths)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the negative log-likelihoods of ``target [B, N]``, a scalar in float32 or wider.

        Raises:
            ValueError: the target is of other tokens, or a word id is not known; the latter is checked on a CPU alone.
        """
        self._check_target(features, target)
        return super().loss(features, target)

    def target_log_probs(self, features: Tensor, target: Tensor) -> Tensor:
        """Return log-probabilities ``[B, N]`` of the words ``target [B, N]``, in float32 or wider; errors as `loss`."""
        self._check_target(features, target)
        return super().target_log_probs(features, target)

    def _check_target(self, features: Tensor, target: Tensor) -> None:
        if target.shape != features.shape[:-1]:
            raise ValueError(
                f"the target is {list(target.shape)}, and the features are {list(features.shape)}: pass a word id for "
                "each token, [B, N]"
            )
        if target.device.type == "cpu":
            check_known(self, target, "the target has")

    def _check_state(self, state: MemoryState, streams: int) -> None:
        if not isinstance(state, (GroupedState, self.memory.state)):
            raise ValueError(
                f"the state is a {type(state).__name__}, and --memory {self.config.memory} has a "
                f"{self.memory.state.__name__}: pass what this model has returned, or None for empty memories"
            )
        others = count_streams(state)
        if others not in (None, streams):
            raise ValueError(
                f"the segment has {streams} streams, and the state is of {others}: pass the state of the same "
                "streams, or None for empty memories; advance clears single ones"
            )
        groups = [group.state for group in state.groups] if isinstance(state, GroupedState) else [state]
        for group in groups:
            if group is not None:
                self._check_rows(group, streams)

    def _check_rows(self, state: MemoryState, streams: int) -> None:
        """Refuse a state of another number of layers, or of more rows than this model's options say."""
        if self._layers_of_state is None:
            none = self.embed_tokens.table(0).new_empty(streams, 0, self.config.decoder_embed_dim)
            self._layers_of_state = _tuples(self.memory.initial_state(none))
        given, wanted = _tuples(state), self._layers_of_state
        other = next((name for name in {**wanted, **given} if given.get(name) != wanted.get(name)), None)
        if other is not None:
            raise ValueError(
                f"the state has {other} of {given.get(other, 0)} layers, and this model of {wanted.get(other, 0)}: "
                "pass what a model with the same options has returned, or None for empty memories"
            )
        for option, (rows, most) in self.memory.rows_held(state).items():
            if rows > most:
                raise ValueError(
                    f"the state has {rows} rows a layer, and {option} is {most}: pass what a model with the same "
                    f"options has returned, or load this one with another {option}"
                )

    def reader(self, batch_size: int = 1) -> Reader:
        """Return a reader of B texts, which are read piece by piece with their memory carried along.

        Raises:
            ValueError: the model is in training mode.
        """
        return Reader(self, self.tokenizer, batch_size)

    @overload
    def score(self, texts: Text) -> Score: ...  # type: ignore[overload-overlap]  # a string is one text
    @overload
    def score(self, texts: Sequence[Text]) -> List[Score]: ...
    @with_nearest_names
    def score(self, texts: Union[Text, Sequence[Text]]) -> Union[Score, List[Score]]:
        """Return the log-probability of every word of texts of any lengths, each after all words before it.

        Args:
            texts: one text, or B of them. A string is read after ``</s>``; of word ids ``[T]``, the first is read and
                not scored.

        Raises:
            ValueError: a word id is not known, a string is given without a tokenizer, or the model is in training mode.
        """
        if isinstance(texts, (str, Tensor)):
            return self.reader().score([texts])[0]
        given = listed(texts)
        return self.reader(len(given)).score(given) if given else []

    @with_nearest_names
    def generate(
        self,
        prompts: Union[Text, Sequence[Text]],
        count: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: Optional[int] = None,
    ) -> Continuation:
        """Continue texts word by word, over a cache of their memory.

        Args:
            prompts: one text, or B of any lengths. A string is read after ``</s>``; of word ids there must be one or
                more.
            count: n, words to add to each.
            temperature: 0 takes the most probable word.
            top_k: draw from the k most probable words only (0: from all).
            top_p: draw from the fewest words whose probabilities add up to this (1: from all).
            seed: of this call's own random numbers; None uses torch's.

        Returns:
            The new words ``[B, n]`` and their log-probabilities ``[B, n]``.

        Raises:
            ValueError: there is no prompt, a prompt is empty, an option makes no sense, or as for `score`.
        """
        prompts = listed(prompts)
        if not prompts:
            raise ValueError("generate continues at least one text of at least one word: begin a text with its </s>")
        reader = self.reader(len(prompts))
        reader.read(prompts)
        return reader.generate(count, Draw(temperature, top_k, top_p), seed)

    @with_nearest_names
    def sample(
        self,
        prompts: Strings,
        count: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: Optional[int] = None,
        stop_at_end: bool = False,
    ) -> Strings:
        """Return a text, or several, each followed by the words that `generate` adds.

        Args:
            prompts: one string, or a list of them.
            stop_at_end: leave out all words after the first new ``</s>``, the end of a line.

        The other arguments, and the errors, are those of `generate`.
        """
        given = listed(prompts)
        texts = [text for text in given if isinstance(text, str)]
        if len(texts) < len(given):
            raise ValueError("sample continues strings: call generate for texts of word ids")
        words = self.generate(texts, count, temperature, top_k, top_p, seed).words if texts else ()
        whole = [self._continued(text, new.tolist(), stop_at_end) for text, new in zip(texts, words, strict=True)]
        return whole[0] if isinstance(prompts, str) else whole

    @with_nearest_names
    def stream(
        self,
        prompt: Text,
        count: Optional[int] = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: Optional[int] = None,
    ) -> Iterator[Token]:
        """Continue a text, and yield each word as soon as it is drawn.

        Args:
            prompt: the text.
            count: words to add; None draws words for as long as the caller asks.

        The other arguments, and the errors, are those of `generate`.
        """
        reader = self.reader()
        reader.read(prompt)
        return reader.stream(count, Draw(temperature, top_k, top_p), seed)

    def _continued(self, text: str, new: List[int], stop_at_end: bool) -> str:
        assert self.tokenizer is not None  # this tokenizer has encoded the text
        if stop_at_end and END in new:
            new = new[: new.index(END)]
        return self.tokenizer.decode([*self.tokenizer.encode(text).tolist(), *new])

    @torch.no_grad()
    def score_documents(self, documents: Sequence[Text], num_streams: int) -> List[Tensor]:
        """Score documents of any lengths, each from an empty memory, many side by side.

        Args:
            documents: word ids ``[T + 1]`` each, or strings, read after ``</s>``. The first word is not scored.
            num_streams: documents read side by side. The scores do not depend on it.

        Returns:
            For each document the log-probabilities ``[T]`` of its words behind the first, in float32 or wider.

        Raises:
            ValueError: a document is empty, no stream is asked for, or as for `score`.
        """
        if self.training:
            raise ValueError("score_documents reads texts without dropout: call model.eval() first")
        if isinstance(documents, str):
            raise ValueError("score_documents reads a list of documents: pass [TEXT] for one")
        if self.tokenizer is not None:
            self.tokenizer.check_size(self.config.vocabulary_size)
        ids = [
            word_ids(self, self.tokenizer, text)
            for text in listed(list(documents) if isinstance(documents, Tensor) else documents)
        ]
        if num_streams < 1 or any(len(document) == 0 for document in ids):
            raise ValueError("score_documents reads documents of at least one word, in at least one stream")
        device = next(self.parameters()).device
        deal = DocumentStreams([len(d) - 1 for d in ids], num_streams, self.segment_length, clear=True)
        streams = [deal.stream(dealt) for dealt in deal.dealt]
        scored: List[List[Tensor]] = [[] for _ in ids]
        waiting: Deque[Tuple[List[List[Extract]], Tensor]] = deque()  # of segments, what each one's features are for

        def pieces() -> Iterator[Piece]:
            for index in range(deal.num_segments):
                extracts = [stream.segment(index) for stream in streams]  # one a stream, none after its end
                words = [
                    ids[own[0].document][own[0].start : own[0].stop + 1] if own else ids[0][:1] for own in extracts
                ]
                padded = nn.utils.rnn.pad_sequence([w.to(device) for w in words], batch_first=True)
                lengths = torch.tensor([len(w) - 1 for w in words], device=device)
                cleared = [row for row, own in enumerate(extracts) if own and own[0].start == 0]
                ended = [row for row, own in enumerate(extracts) if not own]
                ragged = min(map(len, words)) < padded.size(1)
                waiting.append((extracts, padded[:, 1:]))
                yield Piece(padded[:, :-1], lengths if ragged else None, cleared, ended)

        with self.positions.unchanged():
            for features in self.segments().features(pieces()):
                extracts, target = waiting.popleft()
                log_probs = self.target_log_probs(features, target)
                for own, row in zip(extracts, log_probs, strict=True):
                    for extract in own:
                        scored[extract.document].append(row[: extract.stop - extract.start])
        none = self.embed_tokens.table(0).new_empty(0)
        none = none.to(torch.promote_types(none.dtype, torch.float32))  # for documents of one word
        return [torch.cat(pieces) if pieces else none for pieces in scored]

    def save(self, folder: Union[str, Path]) -> None:
        """Write the weights, the configuration and, if there is one, the tokenizer.

        Each file appears whole. `load` refuses weights that were saved with another configuration.

        Raises:
            OSError: the folder cannot be written.
        """
        write_folder(Path(folder), self, self.tokenizer)

    @classmethod
    def load(
        cls, folder: Union[str, Path], device: Union[str, torch.device] = "cpu", **changes: object
    ) -> "LanguageModel":
        """Return the model that `save` has written, or that was exported for transformers, in evaluation mode.

        Args:
            folder: with `config.json` and `model.safetensors`.
            device: where the weights go.
            changes: values of the configuration to replace, such as ``mem_len``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the configuration is not known here, or the weights or the dictionary belong to another one.
        """
        path = Path(folder)
        saved = read_saved(path, changes)
        model = cls(saved.config).to(saved.dtype)
        load_weights(path, model, saved.for_transformers)
        model.tokenizer = load_tokenizer(path, saved.config)
        return model.to(device).eval()


def _tuples(state: MemoryState) -> Dict[str, int]:
    """Return the lengths of a state's tuples, which have an entry for each layer or for some."""
    return {name: len(value) for name, value in state.own().items() if isinstance(value, tuple)}
