"""The device of a benchmark, which it refuses in one line."""

import sys

import torch


def check_device(device: str) -> None:
    """End the program if there is no such device here."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here, pass --device cpu")
