"""A language model for transformers, around the core's.

The attention mask marks padding, which may stand anywhere. Padding is not read, and its scores mean nothing.

Shapes: B sequences, L columns of input, k words of the longest sequence among them, V words, d model width.
"""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.initialization import copy_
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.deprecation import deprecate_kwarg

from ..core import LanguageModel, MemoryState
from ..core.layers.vocabulary import AdaptiveSoftmax
from ..core.reader import check_known, check_segment
from .cache import LamemoCache
from .configuration import CODE, LamemoConfig

IGNORED = -100  # label of a word that is not predicted
# Keywords that transformers passes around and that are not refused.
HARMLESS = ("num_items_in_batch", "position_ids", "return_dict", "output_router_logits")
STUB = '''"""The model of this folder: pip install lamemo-fairseq."""

from lamemo_fairseq.huggingface import LamemoConfig, LamemoForCausalLM, LamemoTokenizer

__all__ = ["LamemoConfig", "LamemoForCausalLM", "LamemoTokenizer"]
'''


class Packed(NamedTuple):
    """The words of a padded input, those of each sequence from the left."""

    tokens: Tensor  # [B, k]
    counts: List[int]  # of each sequence's words
    real: Tensor  # [B, L] whether a column of the input is a word

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Optional[Tensor], before: int = 0) -> "Packed":
        """Pack ``input_ids [B, L]``; the mask may have the columns *before* them too."""
        batch, length = input_ids.shape
        if attention_mask is None:
            return cls(input_ids, [length] * batch, torch.ones_like(input_ids, dtype=torch.bool))
        if attention_mask.shape not in ((batch, length), (batch, before + length)):
            fitting = " or ".join(f"[{batch}, {columns}]" for columns in dict.fromkeys((length, before + length)))
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}: pass {fitting}, with a 0 for each padding"
            )
        if attention_mask.is_floating_point() and (attention_mask < 0).any():
            raise ValueError("attention_mask is to be added to scores: pass one with 1 for each word and 0 for padding")
        real = attention_mask[:, attention_mask.size(1) - length :].to(input_ids.device).bool()
        counts = real.sum(1).tolist()
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        return cls(input_ids.gather(1, order)[:, : max(counts, default=0)], counts, real)

    def unpacked(self, features: Tensor) -> Tensor:
        """Return ``features [B, k, d]`` in the columns of the input, ``[B, L, d]``, with zeros for padding."""
        if min(self.counts, default=0) == self.real.size(1):
            return features
        if features.size(1) == 0:
            return features.new_zeros(*self.real.shape, features.size(2))
        entry = (self.real.cumsum(1) - 1).clamp(min=0).unsqueeze(2).expand(-1, -1, features.size(2))
        return torch.where(self.real.unsqueeze(2), features.gather(1, entry), 0.0)


class LamemoForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model with memory. The core's model is ``model``.

    Without gradients a text is read over a cache, in pieces of any lengths, as one pass over whole segments would read
    it. With gradients it is read segment by segment from an empty memory, and nothing is carried to the next call.
    """

    config_class = LamemoConfig
    base_model_prefix = "model"
    _no_split_modules = ["LanguageModel"]  # decoding calls the modules of a layer one by one
    _is_stateful = True  # a memory cannot go back, so that drafted words cannot be taken back

    def __init__(self, config: LamemoConfig):
        super().__init__(config)
        self.model = LanguageModel(config.to_core())
        # Tied weights are one parameter here, and loading would separate them again.
        self._tied_weights_keys = _ties(self)
        config.tie_word_embeddings = bool(self._tied_weights_keys)
        self.post_init()

    @classmethod
    def of(cls, core: LanguageModel) -> "LamemoForCausalLM":
        """Return the model around one of the core, sharing its weights, in evaluation mode."""
        with torch.device("meta"):
            model = cls(LamemoConfig.of(core.config))
        model.model = core
        model.config.dtype = next(core.parameters()).dtype
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model as transformers does, but refuse missing, superfluous and mismatched weights.

        Raises:
            ValueError: a weight is missing, is one too many, or has another shape.
        """
        kwargs["ignore_mismatched_sizes"] = True  # mismatched sizes are refused below
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {
            "mismatched_keys": "has another shape of the weight",
            "missing_keys": "lacks the weight",
            "unexpected_keys": "has no use for the weight",
        }
        for name, what in wrong.items():
            names = [key if isinstance(key, str) else key[0] for key in info[name]]
            if name == "unexpected_keys":
                names = sorted({*names} - {*model.model.weights_left_out(names, "model.")})
            if names:
                raise ValueError(
                    f"{model.name_or_path}: the model {what} {min(names)}: it was saved with another configuration"
                )
        _restore(model.model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Union[str, Path], *args: Any, **kwargs: Any) -> None:
        """Write the folder as transformers does, and the module that imports this package.

        transformers leaves weights in one file beside newer ones in several, and reads the former.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, f"{CODE}.py").write_text(STUB, encoding="utf-8")
        one, several = Path(save_directory, SAFE_WEIGHTS_NAME), Path(save_directory, SAFE_WEIGHTS_INDEX_NAME)
        if one.exists() and several.exists():
            min(one, several, key=lambda path: path.stat().st_mtime_ns).unlink()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        cache: Optional[Cache] = None,
        inputs_embeds: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: Union[int, Tensor] = 0,
        return_dict: Optional[bool] = None,
        **kwargs: Any,
    ) -> Union[CausalLMOutputWithPast, Tuple[Tensor, ...]]:
        """Read ``input_ids [B, L]``.

        Args:
            input_ids: word ids. With a cache, the words after those that the cache has read.
            attention_mask: ``[B, L]`` or, with a cache, of all columns up to these; 0 for padding.
            cache: a `LamemoCache`, which is read on in place, without gradients.
            inputs_embeds: not taken.
            labels: ``[B, L]`` the same ids, with -100 for those that are not to be predicted; shifted here.
            use_cache: return the cache; by default if there are no gradients.
            logits_to_keep: score only this many last columns (0: all), or the columns of these indices.
            return_dict: False returns a tuple.
            kwargs: ``num_items_in_batch``, by which the loss is divided, and others that change nothing. Of these,
                ``position_ids [B, L]`` must rise, as a row is one text.

        Returns:
            Scores ``[B, L, V]``, log-probabilities if the softmax is adaptive; the loss and the cache.

        Raises:
            ValueError: an argument is not taken, or does not fit.
        """
        _refuse_unknown(input_ids, inputs_embeds, kwargs)
        assert input_ids is not None
        check_segment(input_ids, "input_ids are")
        if cache is not None:
            self._check_cache(cache)
        packed = Packed.of(input_ids, attention_mask, 0 if cache is None else cache.text.columns)
        _refuse_several(packed.real, kwargs.get("position_ids"))
        if input_ids.device.type == "cpu":  # on a GPU, the host would wait for the answer
            check_known(self.model, packed.tokens, "input_ids have")
        learns = self.training or (cache is None and not use_cache and torch.is_grad_enabled())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):  # else the output layer alone would learn
            if learns:
                features, extra = self._read_segments(packed)
            else:
                cache = LamemoCache(self) if cache is None else cache
                features, extra = cache.text.read(packed.tokens, packed.counts, input_ids), {}
            columns, loss = packed.unpacked(features), None
            if labels is not None:
                loss = self._loss(columns, packed.real, labels, extra, kwargs.get("num_items_in_batch"))
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.to(columns.device)
            )
            logits = self._scores(columns[:, kept])
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=cache if use_cache or (use_cache is None and self.config.use_cache) else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _check_cache(self, cache: object) -> None:
        """Refuse a cache that this model cannot read on.

        Raises:
            ValueError: it is not of this package or of another model, or this one is in training.
        """
        if not isinstance(cache, LamemoCache):
            raise ValueError(f"cache is a {type(cache).__name__}: pass LamemoCache(model), or none")
        if self.training:
            raise ValueError("a cache is read without dropout: call model.eval() first")
        if cache.text.model is not self.model:
            raise ValueError("the cache is of another model: pass LamemoCache(model) of this one")

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds words."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ValueError("the embeddings are bands of the vocabulary, of the output layer too: they are not replaced")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise ValueError("the vocabulary is the dictionary's, and fixed: train a model with another dict.txt")

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoModel") -> None:
        """Do nothing: the code in a saved folder imports this package, wherever the object comes from."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Restore the buffers that no file has; the core draws its own weights."""
        if isinstance(module, AdaptiveSoftmax):
            copy_(module.cuts, torch.tensor(module.bands.starts[1:]))

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: Dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError("cache_implementation chooses among caches of keys and values: leave it out")
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = LamemoCache(self)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: Dict[str, Any], **kwargs: Any
    ) -> Any:
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        masked = mask.size(1) if mask is not None else getattr(generation_config, "_mask_length", -1)
        # With a longer mask, transformers takes the ids for new ones alone.
        if isinstance(cache, LamemoCache) and masked == input_ids.size(1):
            cache.text.check_begun(input_ids)
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _read_segments(self, packed: Packed) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Read whole texts segment by segment: features ``[B, k, d]``, and the memory's losses, means over words.

        In evaluation the last segment is filled up, so that it is read as if more words followed.
        """
        length, total = self.model.segment_length, packed.tokens.size(1)
        if total == 0:
            raise ValueError("attention_mask hides every word of the batch: leave the batch out")
        tokens = packed.tokens if self.training else nn.functional.pad(packed.tokens, (0, -total % length))
        ragged = self.training and min(packed.counts, default=0) < total
        features: List[Tensor] = []
        state: Optional[MemoryState] = None
        extra: Dict[str, Tensor] = {}
        for start in range(0, tokens.size(1), length):
            segment = tokens[:, start : start + length]
            left = [min(max(count - start, 0), segment.size(1)) for count in packed.counts]
            lengths = torch.tensor(left, device=tokens.device) if ragged else None
            passed, state, losses = self.model(segment, state, lengths)
            features.append(passed)
            for name, loss in losses.items():
                extra[name] = extra.get(name, 0.0) + loss * (sum(left) / sum(packed.counts))
        return torch.cat(features, dim=1)[:, :total], extra

    def _loss(
        self, columns: Tensor, real: Tensor, labels: Tensor, extra: Dict[str, Tensor], items: Union[int, Tensor, None]
    ) -> Tensor:
        """Return the mean loss of the predicted words. A word behind padding is not predicted."""
        if labels.shape != real.shape:
            raise ValueError(f"labels are {list(labels.shape)}, and input_ids {list(real.shape)}: pass the same ids")
        target = labels[:, 1:].to(columns.device)
        wanted = target.ne(IGNORED) & real[:, :-1] & real[:, 1:]
        count = wanted.sum()
        total = self.model.loss(columns[:, :-1][wanted].unsqueeze(0), target[wanted].unsqueeze(0))
        # A memory's losses are means over words, and are added to the loss of every predicted word.
        return (total + sum(extra.values()) * count) / (count.clamp(min=1) if items is None else items)

    def _scores(self, features: Tensor) -> Tensor:
        return self.model.log_probs(features) if self.model.output is None else self.model.output_layer(features)


def _ties(model: nn.Module) -> Dict[str, str]:
    """Return the name of each parameter that repeats an earlier one, with the earlier name."""
    first: Dict[int, str] = {}
    names = ((name, first.setdefault(id(p), name)) for name, p in model.named_parameters(remove_duplicate=False))
    return {name: source for name, source in names if name != source}


def _restore(core: LanguageModel) -> None:
    """Give an own memory's or encoding's tensors that no file has their values; transformers makes modules without."""
    own = [
        name for name, module in core.named_modules() if not isinstance(module, AdaptiveSoftmax) and _unsaved(module)
    ]
    fresh = LanguageModel(core.config) if own else core
    for name in own:
        module, made = core.get_submodule(name), fresh.get_submodule(name)
        for tensor in _unsaved(module):
            value, former = getattr(made, tensor), getattr(module, tensor)
            setattr(module, tensor, value if former.is_meta else value.to(former))


def _unsaved(module: nn.Module) -> List[str]:
    """Return the names of a module's tensors that are neither parameters nor in files."""
    plain = [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]
    return [*(name for name in module._non_persistent_buffers_set if getattr(module, name) is not None), *plain]


def _refuse_several(real: Tensor, position_ids: Optional[Tensor]) -> None:
    """Refuse positions ``[.., L]`` that begin again within a row: its texts would be read as one.

    Raises:
        ValueError: the positions of a row's words do not rise.
    """
    if position_ids is None:
        return
    positions = position_ids.to(real.device).broadcast_to(real.shape)
    for row, words in zip(positions, real, strict=True):
        if (row[words].diff() < 1).any():
            raise ValueError("position_ids begin again within a row: pass each text in a row of its own, padded")


def _refuse_unknown(input_ids: Optional[Tensor], inputs_embeds: Optional[Tensor], kwargs: Dict[str, Any]) -> None:
    if inputs_embeds is not None or input_ids is None:
        raise ValueError("the model reads words: pass input_ids, and no inputs_embeds")
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in HARMLESS:
            raise ValueError(f"the model has no use for '{name}': leave it out")
