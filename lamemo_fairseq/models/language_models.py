"""The models that fairseq knows by name."""

from typing import Any, Dict, Tuple, Type

from fairseq import hub_utils
from fairseq.models import FairseqLanguageModel, register_model

from ..generation import LanguageModelHub
from ..tasks.segment_language_modeling import SegmentLanguageModelingTask
from .config import MemoryLanguageModelConfig, RelativeTransformerConfig, TransformerXLConfig
from .decoder import MemoryDecoder


class MemoryLanguageModel(FairseqLanguageModel):
    """A decoder with memory, as fairseq builds and calls it."""

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model for a task that feeds consecutive segments.

        Raises:
            ValueError: the task is another one, or the options make no sense.
        """
        if not isinstance(task, SegmentLanguageModelingTask):
            raise ValueError(
                f"a model with memory reads consecutive segments, which {type(task).__name__} does not feed: "
                f"pass --task {SegmentLanguageModelingTask.NAME}"
            )
        return cls(MemoryDecoder(cfg, task.target_dictionary))

    def prepare_for_inference_(self, cfg: Any) -> None:
        super().prepare_for_inference_(cfg)
        self.decoder.for_inference = True

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str = ".",
        **kwargs: Any,
    ) -> LanguageModelHub:
        """Load a trained model to sample from and to score with.

        Args:
            model_name_or_path: folder of the checkpoint.
            checkpoint_file: its name; several separated by ``:`` are averaged.
            data_name_or_path: folder of ``dict.txt``; one that begins with a dot is sought in the checkpoint's folder.
            kwargs: options to override, such as ``mem_len``, and ``tokenizer``, ``bpe`` with their options
                (``bpe="sentencepiece", sentencepiece_model="FILE"``).
        """
        loaded = hub_utils.from_pretrained(str(model_name_or_path), checkpoint_file, str(data_name_or_path), **kwargs)
        return LanguageModelHub(loaded["args"], loaded["task"], loaded["models"])


class LaMemoLanguageModel(MemoryLanguageModel):
    """LaMemo: look-ahead memory, disentangled positions (Ji et al. 2022)."""


class TransformerXLLanguageModel(MemoryLanguageModel):
    """Transformer-XL: recurrent memory, relative positions (Dai et al. 2019)."""


class RelativeTransformerLanguageModel(MemoryLanguageModel):
    """A Transformer with relative positions and no memory."""


MODELS: Dict[str, Tuple[Type[MemoryLanguageModel], Type[MemoryLanguageModelConfig]]] = {
    "lamemo_lm": (LaMemoLanguageModel, MemoryLanguageModelConfig),
    "transformer_xl_lm": (TransformerXLLanguageModel, TransformerXLConfig),
    "relative_transformer_lm": (RelativeTransformerLanguageModel, RelativeTransformerConfig),
}

for _name, (_model, _config) in MODELS.items():
    register_model(_name, dataclass=_config)(_model)
