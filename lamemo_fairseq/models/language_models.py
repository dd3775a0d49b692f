"""The models that fairseq knows by name."""

from typing import Dict, Tuple, Type

from fairseq.models import FairseqLanguageModel, register_model

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
