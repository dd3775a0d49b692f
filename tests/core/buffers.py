"""Buffers full of NaN: one that is not written in full, or read before it is, shows."""

import math

import torch


def fill_with_nan(monkeypatch) -> None:
    def filled(allocate, *args, **kwargs):
        made = allocate(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)
        # A function, not a partial: it has to become a method of Tensor.
        monkeypatch.setattr(owner, name, lambda *a, _allocate=allocate, **k: filled(_allocate, *a, **k))
