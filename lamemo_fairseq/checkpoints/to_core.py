"""A fairseq checkpoint as a model of the core."""

from types import SimpleNamespace
from typing import Any, Dict

import torch
from fairseq.data import Dictionary

from ..core import LanguageModel
from ..host.configuration import complete
from ..models.config import model_config
from ..models.decoder import vocabulary_checksum


def core_model(checkpoint: Dict[str, Any], dictionary: Dictionary) -> LanguageModel:
    """Return the model of a checkpoint, in evaluation mode and in the dtype of its weights.

    Args:
        checkpoint: as `read_ours` reads it.
        dictionary: of the data that it was trained on.

    Raises:
        ValueError: the dictionary is another one, or weights are missing.
    """
    weights = {name.removeprefix("decoder."): weight for name, weight in checkpoint["model"].items()}
    if int(weights.pop("dictionary_version", -1)) != int(vocabulary_checksum(dictionary)):
        raise ValueError("the checkpoint was trained with another dictionary: pass its own as --dictionary")
    options = complete(checkpoint["cfg"])["model"]
    model = LanguageModel(model_config(SimpleNamespace(**options), len(dictionary)))
    model.to(next((weight.dtype for weight in weights.values() if weight.is_floating_point()), torch.float32))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit its options: {str(error).splitlines()[-1]}") from None
    return model.eval()
