"""Mistakes of a new memory that no error tells: found by reading with a tiny model, and named with the remedy.

Shapes: B streams, N tokens of a segment, d model width.
"""

from dataclasses import fields
from typing import Callable, List, Optional, Tuple

import pytest
import torch
from torch import Tensor

from lamemo_fairseq.core import MEMORIES, LanguageModel, MemoryState
from lamemo_fairseq.core.decoding.cache import FrozenCache
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.memory import Passage

from .buffers import fill_with_nan
from .helpers import Variant, random_tokens, reached_by_gradient, read_by_token, tiny_decoder, whole_segments

Read = Tuple[Tensor, Optional[MemoryState], Tensor]  # a segment [B, N], the memory before it, the features after
SEGMENTS = 6  # which fill the memory of a tiny model, whose segments have 3 tokens


def mistake_of(variant: Variant) -> Optional[str]:
    """Return the first mistake of a memory, in one line with the remedy; None if there is none.

    One mistake may be found by several checks. The first ones name causes, the last ones what comes of many.
    """
    for check in CHECKS:
        found = check(variant)
        if found is not None:
            return f"--memory {variant[0]}: {found}"
    return None


def _read(model: LanguageModel, tokens: Tensor) -> List[Read]:
    state, read = None, []
    for segment in tokens.split(model.segment_length, dim=1):
        features, after, _ = model(segment, state)
        read.append((segment, state, features))
        state = after
    return read


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, rtol=0, atol=1e-9)  # in float64; also NaN


@torch.no_grad()
def _unwritten(variant: Variant) -> Optional[str]:
    with pytest.MonkeyPatch.context() as patch:
        fill_with_nan(patch)
        model = tiny_decoder(variant)
        read = _read(model, random_tokens(2, 3 * SEGMENTS))
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"{name} has no initial value: let reset_parameters of its class draw it"
    for index, (_, _, features) in enumerate(read):
        if not features.isfinite().all():
            return (
                f"segment {index} reads numbers that nobody has written: initial_state returns no rows, as "
                "x.new_empty(B, 0, d) has none, or zeros"
            )
    return None


@torch.no_grad()
def _kept_elsewhere(variant: Variant) -> Optional[str]:
    """Read the segments again from the last to the first, each with what a checkpoint before it holds."""
    for training in (False, True):
        model, tokens = tiny_decoder(variant).train(training), random_tokens(2, 3 * SEGMENTS)
        state, read = None, []
        for segment in tokens.split(3, dim=1):
            weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            passage = _read_one(model, segment, state)
            read.append((segment, state, weights, passage))
            state = passage.state
        for segment, state, weights, passage in reversed(read):
            model.load_state_dict(weights)
            again = _read_one(model, segment, state)
            made = [again.features, *again.state.tensors()]
            if not all(map(torch.equal, made, [passage.features, *passage.state.tensors()])):
                kept = "in training, " if training else ""
                return (
                    f"{kept}a segment that is read again, with the same state and after others, gives something else: "
                    "keep all that goes on to the next segment in the state, and draw random numbers in training alone"
                )
    return None


def _read_one(model: LanguageModel, segment: Tensor, state: Optional[MemoryState]) -> Passage:
    torch.manual_seed(0)  # of random numbers that training draws
    return model(segment, state)


@torch.no_grad()
def _of_other_streams(variant: Variant) -> Optional[str]:
    model, tokens = tiny_decoder(variant), random_tokens(3, 3 * SEGMENTS)
    together = torch.cat([features for *_, features in _read(model, tokens)], dim=1)
    for stream, text in enumerate(tokens.split(1)):
        if _differ(torch.cat([features for *_, features in _read(model, text)], dim=1)[0], together[stream]):
            return (
                "a stream that is read alone has other features than beside others: let nothing depend on other "
                "streams, as a mean over the first dimension does"
            )
    return None


@torch.no_grad()
def _of_later_tokens(variant: Variant) -> Optional[str]:
    model = tiny_decoder(variant)
    for segment, state, features in _read(model, random_tokens(2, 3 * SEGMENTS)):
        for changed in range(1, segment.size(1)):
            other = segment.clone()
            other[:, changed:] = 4 + (other[:, changed:] - 3) % 13
            if _differ(model(other, state).features[:, :changed], features[:, :changed]):
                return (
                    "features depend on later tokens of their segment, which they would predict: let tokens attend to "
                    "what the state had before the segment"
                )
    return None


@torch.no_grad()
def _at_the_end(variant: Variant) -> Optional[str]:
    """Read last segments of 1 and 2 tokens, each alone and then both at once, which leaves padding in one."""
    model, lengths = tiny_decoder(variant), torch.tensor([1, 2])
    *_, (segment, state, _) = _read(model, random_tokens(2, 3 * SEGMENTS))
    assert state is not None
    for stream, length in enumerate(lengths.tolist()):
        own = state.map(lambda t, row=stream: t[row : row + 1])
        try:
            alone = model(segment[stream : stream + 1, :length], own).features
        except (RuntimeError, TypeError, ValueError) as error:
            return f"a stream that ends after {length} tokens of a segment of 3 ends in: {str(error).splitlines()[0]}"
        if _differ(model(segment[:, :2], state, lengths).features[stream, :length], alone[0]):
            return (
                f"a stream that ends after {length} tokens has other features if padding is behind them: leave out "
                "what lies beyond segment.lengths, where there are some"
            )
    return None


@torch.no_grad()
def _unread(variant: Variant) -> Optional[str]:
    model, segment = tiny_decoder(variant), random_tokens(1, 3)
    texts = (random_tokens(1, 3 * SEGMENTS, seed=seed) for seed in (1, 2))
    one, two = (model(segment, _read(model, text)[-1][1]).features for text in texts)
    if MEMORIES[variant[0]].remembers and not _differ(one, two):
        return "a segment after two texts has the same features: let the layers read what the state has"
    return None


@torch.no_grad()
def _of_other_options(variant: Variant) -> Optional[str]:
    """Read on with one more of what each option counts: a state of other shapes is refused, or fills up to the same."""
    memory, tokens = MEMORIES[variant[0]], random_tokens(2, 9 * SEGMENTS)
    model = tiny_decoder(variant)
    states = [state for _, state, _ in _read(model, tokens)]
    for option in fields(memory.options):
        value = getattr(model.memory.config.options, option.name)
        if option.name in memory.layout or not isinstance(value, int) or isinstance(value, bool):
            continue
        try:
            other = tiny_decoder(variant, **{option.name: value + 1})
            expected = _read(other, tokens)[-1][1]
            state = states[-1]
            for segment in tokens.split(model.segment_length, dim=1):
                state = other(segment, state).state
        except ValueError:  # which names the option
            continue
        except RuntimeError:
            state = None
        shapes = [[t.shape for t in each.tensors()] for each in (state, expected) if each is not None]
        if shapes[0] != shapes[-1] or len(shapes) < 2:
            flag = "--" + option.name.replace("_", "-")
            return f"a state depends on {flag}, and a resumed run could have another: write '{option.name}' into layout"
    return None


def _untrained(variant: Variant) -> Optional[str]:
    """Train in updates of each number of segments, of which the last one is too short for a whole segment."""
    for segments in (1, 2) if MEMORIES[variant[0]].carries_gradient else (1,):
        model, state, zero = (
            tiny_decoder(variant, segment_length=3 * segments, bptt_segments=segments).train(),
            None,
            {},
        )
        length, text = 3 * segments, random_tokens(2, 3 * segments * SEGMENTS + 3)
        for index, start in enumerate(range(0, text.size(1) - 1, length)):
            update = text[:, start : start + length + 1]
            features, state, losses = model(update[:, :-1], state)
            model.zero_grad()
            sum(losses.values(), model.loss(features, update[:, 1:])).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is None:
                    return (
                        f"{name} has no gradient in update {index} with --bptt-segments {segments}, and several ranks "
                        "would wait for it: let features depend on it in every update, as where slots are read, "
                        "not where they are stored; or add it by with_unread (core/memory/unread.py)"
                    )
                zero[name] = zero.get(name, True) and not parameter.grad.any()
    if True in zero.values():
        name = next(name for name, always in zero.items() if always)
        return (
            f"{name} is never trained, its gradient is zero in every update: let features depend on it before "
            "detach(), or write carries_gradient = True for what only the next segment reads"
        )
    return None


def _gradient_that_ends(variant: Variant) -> Optional[str]:
    if not MEMORIES[variant[0]].carries_gradient:
        return None
    model = tiny_decoder(variant, segment_length=6, bptt_segments=3).train()
    if reached_by_gradient(model, random_tokens(2, 6))[1]:
        return None
    return (
        "carries_gradient is True, and no gradient reaches the segment before: leave it out, or keep the gradient of "
        "what the state is made of, which last_rows and detach() take away"
    )


@torch.no_grad()
def _slots_that_are_no_tokens(variant: Variant) -> Optional[str]:
    """Change one of the last tokens: of the rows that a model's only layer keeps, its own changes, and no earlier one.

    Later rows may know of the token, if they are what comes out of a layer.
    """
    if not MEMORIES[variant[0]].slots_are_tokens:
        return None
    model, text = tiny_decoder(variant, decoder_layers=1), random_tokens(1, 3 * SEGMENTS)
    slots = model.memory.slots
    for place in range(1, slots + 1):
        other = text.clone()
        other[:, -place] = 4 + (other[:, -place] - 3) % 13
        states = (_read(model, torch.cat([read, text[:, :3]], dim=1))[-1][1] for read in (text, other))
        for one, two in zip(*(state.tensors() for state in states), strict=True):
            if one.dim() == 3 and one.size(1) == slots:
                changed = (one != two).any(2)[0].nonzero().flatten().tolist()
                if changed[:1] != [slots - place]:
                    others = ", ".join(str(slots - row) for row in changed)
                    return (
                        f"slots_are_tokens is True, and another token {place} before a segment changes "
                        f"{f'the slots {others} before it' if others else 'no slot'}: leave slots_are_tokens out, or "
                        "let each slot be that of its token"
                    )
    return None


@torch.no_grad()
def _decoded(variant: Variant) -> Optional[str]:
    model, tokens = tiny_decoder(variant), random_tokens(2, 3 * SEGMENTS)
    expected = model.output_layer(whole_segments(model, tokens))
    wrong = (read_by_token(model, tokens) - expected).abs().amax((0, 2)) > 1e-9
    if not wrong.any():
        return None
    found = f"token {int(wrong.int().argmax())} has other scores if tokens are decoded one by one, in segments of 3"
    cache = MEMORIES[variant[0]].cache
    if cache is FrozenCache:
        return f"{found}: FrozenCache serves slots that are as they were as tokens, others need a cache of their own"
    return f"{found}: let end_segment and next_position of {cache.__name__} make the slots that the state has"


@torch.no_grad()
def _reordered(variant: Variant) -> Optional[str]:
    model, tokens, lengths = tiny_decoder(variant), random_tokens(3, 3 * SEGMENTS), [8, 4, 13]
    state, order = DecodingState(model, 3), [2, 0, 0]
    state.read(tokens[:, : max(lengths)], lengths)
    state.reorder(torch.tensor(order))
    tokens, lengths = tokens[order], [lengths[source] for source in order]
    found = state.read(torch.stack([tokens[row, n : n + 1] for row, n in enumerate(lengths)]))
    expected = whole_segments(model, tokens)
    if any(_differ(found[row, 0], expected[row, n]) for row, n in enumerate(lengths)):
        return "sequences that were reordered go on from others: keep all that decoding needs in fields of the cache"
    return None


def _in_half(variant: Variant) -> Optional[str]:
    model, tokens = tiny_decoder(variant, dtype=torch.bfloat16).train(), random_tokens(2, 3 * SEGMENTS)
    try:
        for *_, features in _read(model, tokens):
            features.sum().backward()
            if features.dtype != torch.bfloat16:
                return f"features are {features.dtype} in a model of torch.bfloat16: call .to(rows) on what is added"
        with torch.no_grad():
            read_by_token(model.eval(), tokens)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"in half precision: {str(error).splitlines()[0]}"
    return None


CHECKS: List[Callable[[Variant], Optional[str]]] = [
    _unwritten,
    _kept_elsewhere,
    _of_other_streams,
    _of_later_tokens,
    _at_the_end,
    _unread,
    _of_other_options,
    _untrained,
    _gradient_that_ends,
    _slots_that_are_no_tokens,
    _decoded,
    _reordered,
    _in_half,
]
