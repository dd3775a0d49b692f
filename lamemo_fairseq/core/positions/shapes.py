"""The check of a position encoding's results: a wrong shape would give scores of other distances, or other heads.

Shapes: L layers, H heads, D size of a head, U distances.
"""

from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from torch import Tensor

from .bias import LayerBias, PositionConfig


def check_biases(
    encoding: str, config: PositionConfig, biases: Sequence[LayerBias], causal: int, ahead: Optional[range]
) -> None:
    """Refuse biases of other shapes than those that attention takes.

    Args:
        encoding: the name of the class, for errors.
        biases: what it has returned for *causal* keys and the distances *ahead*.

    Raises:
        ValueError: the message names the class, the field and the shape to return.
    """
    if len(biases) != config.layers:
        raise ValueError(
            f"{encoding}.biases returned {len(biases)} biases: return one for each of {config.layers} layers"
        )
    if ahead is not None and any(bias.ahead is None for bias in biases[config.first_ahead :]):
        raise ValueError(
            f"{encoding}.biases returned ahead=None, and this memory attends to the right: return a RelativeBias for "
            "the distances ahead, or pass a --memory that does not look ahead"
        )
    for bias in {id(bias): bias for bias in biases}.values():  # layers often share one
        for kind, fields, distances in (("causal", bias.causal, causal), ("ahead", bias.ahead, len(ahead or ()))):
            if fields is not None:
                _check(f"{encoding}.biases: {kind}", fields._asdict(), config, distances)
        if bias.rotation is not None:
            angles = {"cos": bias.rotation.cos, "sin": bias.rotation.sin}
            _check(f"{encoding}.biases: rotation", angles, config, causal)


def _check(what: str, tensors: Mapping[str, Optional[Tensor]], config: PositionConfig, distances: int) -> None:
    heads, size = config.heads, config.head_dim
    shapes: Dict[str, Tuple[str, List[int]]] = {
        "content": ("[H, D]", [heads, size]),
        "position": ("[H, D]", [heads, size]),
        "table": ("[H, U, D]", [heads, distances, size]),
        "score": ("[H, U]", [heads, distances]),
        "cos": ("[U, D/2]", [distances, size // 2]),
        "sin": ("[U, D/2]", [distances, size // 2]),
    }
    for name, tensor in tensors.items():
        letters, shape = shapes[name]
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{what}.{name} is {list(tensor.shape)}: return {letters}, which is {shape} here")
