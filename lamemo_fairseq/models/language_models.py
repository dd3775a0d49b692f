"""The models that fairseq knows by name."""

from typing import Any, Dict, NamedTuple, Optional, Type, cast

from fairseq import hub_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.models import ARCH_MODEL_REGISTRY, FairseqLanguageModel, register_model
from torch import Tensor

from ..core.kernels.module_tree import tree_of
from ..core.memory import MEMORIES
from ..core.memory.position import real_tokens
from ..generation import LanguageModelHub
from ..host.generation_options import refusal
from ..host.named_checkpoints import check_files
from ..host.own import OwnModel, OwnTask, not_fed
from ..host.restoring import opening
from .config import MemoryLanguageModelConfig, check_defaults, with_defaults
from .decoder import FairseqMemoryDecoder


class MemoryLanguageModel(OwnModel, FairseqLanguageModel):
    """A decoder with memory, as fairseq builds and calls it."""

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model for a task that feeds consecutive segments.

        Raises:
            ValueError: the task is of another kind, or the options make no sense.
        """
        feeds_segments = isinstance(task, OwnTask)
        if not feeds_segments:
            raise not_fed(type(task))
        if task.cfg.tokens_per_sample is not None:
            # In evaluation the segment length may differ from the trained one; prompts and texts are cut as the streams
            # are.
            cfg.tokens_per_sample = task.cfg.tokens_per_sample
        return cls(FairseqMemoryDecoder(cfg, task.target_dictionary))

    def get_targets(self, sample: Dict[str, Any], net_output: Any) -> Tensor:
        """Return the words ``[B, N]`` that the scores of `FairseqMemoryDecoder.forward` are for."""
        inputs, target = sample["net_input"], sample["target"]
        return target[real_tokens(target, inputs["src_lengths"])].unsqueeze(0) if inputs.get("real_only") else target

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Take a checkpoint's weights.

        Raises:
            ValueError: the weights are those of a model with other options.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            told = [line.strip() for line in str(error).split("\n")[1:]]
            first = next((line for line in told if line.startswith("size mismatch")), told[0])
            raise ValueError(
                "the checkpoint's weights are those of a model with another --arch or other options: take those that "
                "it was trained with. --model-overrides can change options without weights, and {'memory': 'none'} "
                f"leaves out weights of a memory, but not the weights that a memory adds to layers. {first[:200]}"
            ) from error

    def train(self, mode: bool = True) -> "MemoryLanguageModel":
        """Set the mode if a module has another: fairseq asks twice an update, and looking takes a tenth of the time."""
        if self.training is not mode or any(module.training is not mode for module in tree_of(self).inner):
            super().train(mode)
        return self

    def set_num_updates(self, num_updates: int) -> None:
        """Pass the number of updates to the modules that count them; asking their classes takes a tenth of the time."""
        for module in tree_of(self).inner:
            if hasattr(type(module), "set_num_updates"):
                cast(Any, module).set_num_updates(num_updates)

    def prepare_for_inference_(self, cfg: Any) -> None:
        if getattr(cfg.generation, "retain_dropout", False):
            raise ValueError(refusal("retain_dropout"))
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
            data_name_or_path: folder of ``dict.txt``; a folder that begins with a dot is looked up in the checkpoint's
                folder.
            kwargs: options to override, such as ``mem_len``, and ``tokenizer``, ``bpe`` with their options
                (``bpe="sentencepiece", sentencepiece_model="FILE"``).

        Raises:
            FileNotFoundError: a folder or a checkpoint is missing.
            ValueError: a checkpoint is not one of this package, or an argument is not known.
        """
        check_files(str(model_name_or_path), checkpoint_file, str(data_name_or_path), kwargs)
        with opening():
            loaded = hub_utils.from_pretrained(
                str(model_name_or_path), checkpoint_file, str(data_name_or_path), **kwargs
            )
        return LanguageModelHub(loaded["args"], loaded["task"], loaded["models"])


class NamedModel(NamedTuple):
    """A model as fairseq knows it by an architecture's name."""

    model: Type[MemoryLanguageModel]
    config: Type[FairseqDataclass]


def subclass(base: Type[MemoryLanguageModel], name: str, summary: Optional[str]) -> Type[MemoryLanguageModel]:
    """Return a subclass under another name: fairseq notes a model's options on its class."""

    class Named(base):  # type: ignore[valid-type, misc]
        __doc__ = summary

    Named.__name__ = Named.__qualname__ = name
    Named.__module__ = __name__
    return Named


def check_new(memory: str, architecture: str) -> None:
    """Refuse the name of another architecture, with which fairseq would go on.

    Raises:
        ValueError: the name is taken.
    """
    if architecture in ARCH_MODEL_REGISTRY:
        raise ValueError(f"memory '{memory}': another model is --arch {architecture}, give the architecture a new name")


def _named(memory: str) -> NamedModel:
    architecture = MEMORIES[memory].architecture
    check_new(memory, architecture.name)
    check_defaults(memory, "Architecture.defaults", architecture.defaults)
    name = architecture.class_name
    config = with_defaults(MemoryLanguageModelConfig, f"{name}Config", memory=memory, **architecture.defaults)
    model = subclass(MemoryLanguageModel, name, architecture.summary)
    register_model(architecture.name, dataclass=config)(model)
    return NamedModel(model, config)


MODELS: Dict[str, NamedModel] = {MEMORIES[memory].architecture.name: _named(memory) for memory in MEMORIES.names()}
"""The model and the config of every architecture."""


def __getattr__(name: str) -> Type[MemoryLanguageModel]:
    """Return the model of a memory by the name of its class, such as ``LaMemoLanguageModel``."""
    for known in MODELS.values():
        if known.model.__name__ == name:
            return known.model
    raise AttributeError(f"module {__name__} has no attribute '{name}'")
