"""Sizes with which every memory's state stops growing, so that its segments are recorded, and an evaluation of them."""

import torch

from .helpers import read_streams

SEGMENT = 4
SIZES = {"segment_length": SEGMENT, "compressed_len": 2}


def scores(decoder, tokens):
    """Of an evaluation in streams, segment by segment."""
    with torch.no_grad():
        return read_streams(decoder.eval(), tokens).split(SEGMENT, dim=1)
