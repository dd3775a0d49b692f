"""Causal self-attention, with the maps of the layer's associative memory beside it."""

from ...layers import AttentionConfig, CausalSelfAttention
from .association import Association
from .options import AssociativeOptions


class AssociativeSelfAttention(CausalSelfAttention):
    """Causal attention over ``[cache; x; memory tokens]``. The memory is read and written outside of the attention."""

    def __init__(self, config: AttentionConfig):
        if config.span is not None:
            raise ValueError(
                "--same-length would hide tokens of a segment from the memory tokens behind it: leave it "
                "out, or pass --memory recurrent instead of associative"
            )
        super().__init__(config)
        assert isinstance(config.options, AssociativeOptions)
        self.association = Association(config.embed_dim, config.options)
