"""A language model for Python: built from a configuration, saved to a folder, loaded from it.

Shapes: B texts, n new words.
"""

import functools
import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import List, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .decoder import MemoryDecoder
from .decoding.drawing import Draw
from .decoding.sampler import Continuation, Sampler
from .decoding.state import DecodingState
from .fields import Values
from .memory import MemoryState, Passage
from .memory.documents import DocumentStreams
from .memory.groups import advance

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1  # of the folder


class LanguageModel(MemoryDecoder):
    """A language model with memory, which passes its memory in and out as a value.

    Example::

        model = LanguageModel(ModelConfig(vocabulary_size=1000, segment_length=150))
        features, state, losses = model(tokens, state)
        loss = model.loss(features, target) / target.numel() + sum(losses.values())
    """

    def forward(self, tokens: Tensor, state: Optional[MemoryState] = None, lengths: Optional[Tensor] = None) -> Passage:
        """Read one segment; arguments and result as for `read`."""
        return self.read(tokens, state, lengths)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Tensor], count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Continuation:
        """Continue texts word by word, over a cache of their memory; random numbers are torch's.

        Args:
            prompts: B texts of at least one word id each, of any lengths.
            count: n, words to add to each.
            temperature: 0 takes the most probable word.
            top_k: draw from the k most probable words only (0: from all).
            top_p: draw from the fewest words that hold this probability together (1: from all).

        Returns:
            The new words ``[B, n]`` and their log-probabilities ``[B, n]``.

        Raises:
            ValueError: there is no prompt, or an empty one, or the model is in training mode.
        """
        if self.training:
            raise ValueError("generate reads texts without dropout: call model.eval() first")
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) == 0:
            raise ValueError("generate continues at least one text of at least one word: begin a text with its </s>")
        device = next(self.parameters()).device
        tokens = nn.utils.rnn.pad_sequence([prompt.to(device) for prompt in prompts], batch_first=True)
        state = DecodingState(self, len(prompts))
        if max(lengths) > 1:
            state.read(tokens[:, :-1], [length - 1 for length in lengths])
        last = tokens.gather(1, torch.tensor(lengths, device=device).unsqueeze(1) - 1).squeeze(1)
        return Sampler(state, Draw(temperature, top_k, top_p)).go_on(last, count)

    @torch.no_grad()
    def score_documents(self, documents: Sequence[Tensor], num_streams: int) -> List[Tensor]:
        """Score documents of any lengths, each from an empty memory, many side by side.

        Args:
            documents: word ids ``[T + 1]`` each. The first one, such as ``</s>``, is not scored.
            num_streams: documents read side by side. The scores do not depend on it.

        Returns:
            For each document the log-probabilities ``[T]`` of its words behind the first, in float32 or wider.

        Raises:
            ValueError: a document is empty, no stream is asked for, or the model is in training mode.
        """
        if self.training:
            raise ValueError("score_documents reads texts without dropout: call model.eval() first")
        if num_streams < 1 or any(len(document) == 0 for document in documents):
            raise ValueError("score_documents reads documents of at least one word, in at least one stream")
        device = next(self.parameters()).device
        deal = DocumentStreams([len(d) - 1 for d in documents], num_streams, self.segment_length, clear=True)
        streams = [deal.stream(dealt) for dealt in deal.dealt]
        scored: List[List[Tensor]] = [[] for _ in documents]
        state: Optional[MemoryState] = None
        for index in range(deal.num_segments):
            extracts = [stream.segment(index) for stream in streams]  # one of each stream, none where it has ended
            words = [
                documents[own[0].document][own[0].start : own[0].stop + 1] if own else documents[0][:1]
                for own in extracts
            ]
            padded = nn.utils.rnn.pad_sequence([w.to(device) for w in words], batch_first=True)
            lengths = torch.tensor([len(w) - 1 for w in words], device=device)
            cleared = [row for row, own in enumerate(extracts) if own and own[0].start == 0]
            ended = [row for row, own in enumerate(extracts) if not own]
            state = advance(state, num_streams, cleared, ended)
            ragged = min(map(len, words)) < padded.size(1)
            features, state, _ = self.read(padded[:, :-1], state, lengths if ragged else None)
            log_probs = self.log_probs(features).gather(2, padded[:, 1:].unsqueeze(2)).squeeze(2)
            for own, row in zip(extracts, log_probs, strict=True):
                for extract in own:
                    scored[extract.document].append(row[: extract.stop - extract.start])
        return [torch.cat(parts) if parts else torch.empty(0) for parts in scored]

    def save(self, folder: Union[str, Path]) -> None:
        """Write the weights and the configuration. Each file appears whole; `load` tells the files of two saves apart.

        Raises:
            OSError: the folder cannot be written.
        """

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **self.config.to_dict()}, indent=2) + "\n"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            _safetensors().torch.save_model(self, f"{unfinished}/{WEIGHTS}", metadata={CONFIG: text})
            Path(unfinished, CONFIG).write_text(text, encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                os.replace(f"{unfinished}/{name}", folder / name)

    @classmethod
    def load(
        cls, folder: Union[str, Path], device: Union[str, torch.device] = "cpu", **changes: object
    ) -> "LanguageModel":
        """Return the model that `save` has written, in evaluation mode.

        Args:
            folder: with `config.json` and `model.safetensors`.
            device: where the weights go.
            changes: values of the configuration to replace, such as ``mem_len``.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: the configuration is not known here, or the weights are those of another one.
        """

        path = Path(folder)
        config = _read_config(path, changes)
        model = cls(config).to(_dtype_of(path / WEIGHTS))
        try:
            _safetensors().torch.load_model(model, path / WEIGHTS)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).split("\n") if line.strip()]
            raise ValueError(f"{folder}: the weights are those of another configuration: {lines[-1][:200]}") from error
        return model.to(device).eval()


def _read_config(folder: Path, changes: Values) -> ModelConfig:

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is not there: pass a folder that LanguageModel.save has written")
    text = (folder / CONFIG).read_text(encoding="utf-8")
    try:
        with _safetensors().safe_open(folder / WEIGHTS, framework="pt") as weights:
            saved_with = (weights.metadata() or {}).get(CONFIG)
        values = json.loads(text)
        written = values.pop("format")
    except (_safetensors().SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} is not a folder that LanguageModel.save has written: {error}") from error
    if written != FORMAT:
        raise ValueError(f"{folder / CONFIG} has format {written}, this version reads {FORMAT}: install a newer one")
    if saved_with != text:
        raise ValueError(
            f"{folder / CONFIG} is not the configuration that {WEIGHTS} was saved with: save the model again; to "
            "change a value, pass it to LanguageModel.load"
        )
    return ModelConfig.from_dict({**values, **changes})


def _dtype_of(weights: Path) -> torch.dtype:
    """Return the widest dtype of saved weights."""

    with _safetensors().safe_open(weights, framework="pt") as saved:
        dtypes = {saved.get_tensor(name).dtype for name in saved.keys()}  # noqa: SIM118
    widest: torch.dtype = functools.reduce(torch.promote_types, dtypes)
    return widest


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("models are saved and loaded with safetensors: pip install safetensors") from None
    return safetensors
