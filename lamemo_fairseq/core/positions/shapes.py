"""The check of a position encoding's results: a wrong shape would give scores of other distances, or other heads.

Shapes: D size of a head, U distances.
"""

from typing import Optional, Sequence

from ..attention.inputs import check_bias, check_shape
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
    other = next((bias for bias in biases if not isinstance(bias, LayerBias)), None)
    if other is not None:
        raise ValueError(f"{encoding}.biases returned a {type(other).__name__}: return a LayerBias for each layer")
    if ahead is not None and any(bias.ahead is None for bias in biases[config.first_ahead :]):
        raise ValueError(
            f"{encoding}.biases returned ahead=None, and this memory attends to the right: return a RelativeBias for "
            "the distances ahead, or pass a --memory that does not look ahead"
        )
    for bias in {id(bias): bias for bias in biases}.values():  # layers often share one
        for kind, fields, distances in (("causal", bias.causal, causal), ("ahead", bias.ahead, len(ahead or ()))):
            if fields is not None or kind == "causal":
                check_bias(f"{encoding}.biases: {kind}", fields, config.heads, config.head_dim, distances, "return")
        if bias.rotation is not None:
            for name, angles in (("cos", bias.rotation.cos), ("sin", bias.rotation.sin)):
                shape = (causal, config.head_dim // 2)
                check_shape(f"{encoding}.biases: rotation.{name}", angles, "[U, D/2]", shape, "return")
