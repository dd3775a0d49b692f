"""fairseq's dataclasses of options, and their defaults: made once, as a resume asks a dozen times."""

import copy
from typing import Any, Dict, Type

from fairseq.dataclass import FairseqDataclass
from omegaconf import OmegaConf

_defaults: Dict[Type[FairseqDataclass], Any] = {}
_options: Dict[Type[FairseqDataclass], Any] = {}


def defaults_of(dataclass: Type[FairseqDataclass]) -> Dict[str, Any]:
    """Return the default of each option; ``${section.option}`` refers to another option's default."""
    if dataclass not in _defaults:
        _defaults[dataclass] = OmegaConf.to_container(structured(dataclass), resolve=False, enum_to_str=True)
    return copy.deepcopy(_defaults[dataclass])


def structured(dataclass: Type[FairseqDataclass]) -> Any:
    """Return the options as OmegaConf holds them, which all callers share."""
    if dataclass not in _options:
        _options[dataclass] = OmegaConf.structured(dataclass())
    return _options[dataclass]
