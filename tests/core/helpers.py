"""Small models of the core, and ways to read with them."""

import logging
from dataclasses import fields
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from lamemo_fairseq.core import MEMORIES, LanguageModel, MemoryState, ModelConfig
from lamemo_fairseq.core.decoding.state import DecodingState
from lamemo_fairseq.core.positions import POSITIONS

Variant = Tuple[str, str, str]

# Every combination of memory, positions and window that makes sense, and some of memories with more choices.
VARIANTS = [
    *(
        ("lookahead", p, w)
        for p in ("disentangled", "disentangled-content", "transformer-xl")
        for w in ("right", "full")
    ),
    ("recurrent", "transformer-xl", "right"),
    ("recurrent", "shaw", "right"),
    ("none", "transformer-xl", "right"),
    ("none", "shaw", "right"),
    ("none", "absolute", "right"),
    ("compressive", "transformer-xl", "conv"),
    ("compressive", "transformer-xl", "most-used"),
    ("compressive", "shaw", "most-used"),
    ("continuous", "transformer-xl", "right"),
    ("token", "transformer-xl", "right"),
    ("lookahead", "alibi", "full"),
    ("recurrent", "alibi", "right"),
    ("none", "alibi", "right"),
    ("compressive", "alibi", "most-used"),
    ("continuous", "alibi", "right"),
    ("token", "alibi", "right"),
    ("lookahead", "rotary", "right"),
    ("recurrent", "rotary", "right"),
    ("none", "rotary", "right"),
    ("compressive", "rotary", "most-used"),
    ("continuous", "rotary", "right"),
    ("token", "rotary", "right"),
    ("enhanced", "transformer-xl", "right"),
    ("enhanced", "shaw", "right"),
    ("enhanced", "alibi", "right"),
    ("enhanced", "rotary", "right"),
    ("infini", "transformer-xl", "linear"),
    ("infini", "transformer-xl", "delta"),
    ("infini", "alibi", "delta"),
    ("infini", "rotary", "linear"),
    ("memorizing", "transformer-xl", "top-k"),
    ("memorizing", "transformer-xl", "dense"),
    ("memorizing", "shaw", "dense"),
    ("memorizing", "alibi", "top-k"),
    ("memorizing", "rotary", "dense"),
    ("associative", "transformer-xl", "right"),
    ("associative", "alibi", "right"),
    ("associative", "rotary", "right"),
    ("lookahead", "segatron", "full"),
    ("block-recurrent", "t5", "fixed"),
    ("block-recurrent", "transformer-xl", "lstm"),
    ("block-recurrent", "rotary", "fixed"),
    ("lookahead", "disentangled", "upper"),
    ("lookahead", "disentangled", "seldom"),
]

# The option that the third part of a variant is for, where it is not the window.
CHOICES = {
    "compressive": "compression",
    "infini": "memory_update_rule",
    "memorizing": "retrieval",
    "block-recurrent": "state_gate",
}

# Third parts of variants that stand for other options.
SEVERAL: Dict[str, Dict[str, Any]] = {
    "upper": {"lookahead_from_layer": 2, "decoder_layers": 3},
    "seldom": {"lookahead_every": 2},
}

# Sizes of a model small enough for hundreds of examples. Every memory's own options are among them.
TINY = {
    "num_basis_functions": 6,
    "basis_widths": "0.1,0.3",
    "memory_samples": 7,
    "mem_len": 4,
    "compressed_len": 3,
    "compression_rate": 2,
    "memory_tokens": 2,
    "store_len": 7,
    "associative_tokens": 3,
    "associative_dim": 16,
    "recurrent_scale": 1.0,  # as in the paper; larger ones amplify rounding
    "recurrent_states": 3,
    "memory_gate_lr_scale": 1.25,
    "segment_length": 3,
    "decoder_layers": 2,
    "decoder_embed_dim": 8,
    "decoder_attention_heads": 2,
    "decoder_ffn_embed_dim": 12,
    "dropout": 0.0,
}

ENDS = {"sentence_ends": (5, 7), "paragraph_ends": (9,)}  # words that positions count


def recording_of(model: Any, training: bool = True) -> Any:
    """Return a model's newest graph of segments of training, or of evaluation; None if there is none yet."""
    recordings = model.graphs._recorded[training].recordings
    return recordings[-1][1] if recordings else None


def first_of_each_memory() -> Dict[str, Variant]:
    """Return each registered memory's first variant, by its name.

    Raises:
        ValueError: a memory has none.
    """
    first = {variant[0]: variant for variant in reversed(VARIANTS)}
    for name in MEMORIES.names():
        if name not in first:
            positions = "disentangled" if MEMORIES[name].looks_ahead else "transformer-xl"
            raise ValueError(
                f"--memory {name} has no tests: add a line to VARIANTS in tests/core/helpers.py for each position "
                f'encoding that it is to be tested with, such as ("{name}", "{positions}", "right"),'
            )
    return {name: first[name] for name in MEMORIES.names()}


def tiny_options(variant: Variant, options: Dict[str, Any]) -> Dict[str, Any]:
    """Return the options of a tiny model: those of a variant, then *options*."""
    memory, positions, choice = variant
    third = SEVERAL.get(choice) or {CHOICES.get(memory, "lookahead_window"): choice}
    chosen = {"memory": memory, "position_encoding": positions, **third}
    return {**TINY, **(ENDS if POSITIONS[positions].reads_words else {}), **chosen, **options}


def looks_ahead(positions: str) -> bool:
    """Tell whether a position encoding takes a memory that attends to the right."""
    return not _refused(lambda: POSITIONS[positions].check(looks_ahead=True))


def limits_distances(positions: str) -> bool:
    """Tell whether a position encoding takes a limit of distances."""
    memory = "lookahead" if looks_ahead(positions) else "none"
    return not _refused(lambda: tiny_decoder((memory, positions, "right"), clamp_len=3))


def _refused(make: Callable[[], Any]) -> bool:
    try:
        make()
    except ValueError:
        return True
    return False


def config_of(words: int, **options: Any) -> ModelConfig:
    """Return a configuration; the options of every memory may be among the others, and the chosen one takes its own."""
    names = {memory: {f.name for f in fields(MEMORIES[memory].options)} for memory in MEMORIES.names()}
    own = MEMORIES[options["memory"]].options
    mine = {name: value for name, value in options.items() if name in names[options["memory"]]}
    others = set().union(*names.values())
    rest = {name: value for name, value in options.items() if name not in others}
    return ModelConfig(words, **rest, memory_options=own(**mine))


def tiny_decoder(
    variant: Variant = VARIANTS[0], words: int = 17, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> LanguageModel:
    """Return a tiny model in evaluation mode, without dropout, with options replaced by others."""
    torch.manual_seed(seed)
    model = LanguageModel(config_of(words, **tiny_options(variant, options)))
    enlarge(model)
    return model.to(dtype).eval()


def features_and_gradients(decoder: LanguageModel, tokens: Tensor) -> List[Tensor]:
    """Return the features of ``tokens [B, N]`` in training, and the gradients of all parameters but embeddings."""
    scores = decoder.train().read_segment(tokens.to(decoder.embed_tokens.table(0).device), None).features
    parameters = [p for name, p in decoder.named_parameters() if not name.startswith("embed_tokens")]
    gradients = torch.autograd.grad(scores.logsumexp(-1).sum(), parameters, allow_unused=True)
    return [scores, *(g for g in gradients if g is not None)]


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Multiply weights by ten, as initial ones are so small that attention would hardly matter.

    Products that begin as nothing become random ones.
    """
    for parameter in model.parameters():
        parameter.mul_(10)
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.1)


def random_tokens(streams: int, length: int, words: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(4, words, (streams, length), generator=torch.Generator().manual_seed(seed))


def segments_of(
    model: LanguageModel, tokens: Tensor, lengths: Optional[Sequence[int]] = None
) -> Iterator[Tuple[Tensor, Optional[Tensor]]]:
    """Yield the segments of ``tokens [B, T]`` in order, and how much of each row is no padding; None for all of it."""
    for start in range(0, tokens.size(1), model.segment_length):
        segment = tokens[:, start : start + model.segment_length]
        if lengths is None or start + segment.size(1) <= min(lengths):
            yield segment, None
        else:
            yield segment, (torch.as_tensor(lengths) - start).clamp(0, segment.size(1)).to(segment.device)


def read_streams(
    model: LanguageModel, tokens: Tensor, lengths: Optional[Sequence[int]] = None, state: Optional[MemoryState] = None
) -> Tensor:
    """Return the scores of ``tokens [B, T]``, read in segments with the memory carried from one to the next."""
    scores = []
    for segment, real in segments_of(model, tokens, lengths):
        features, state, _ = model(segment, state, real)
        scores.append(model.output_layer(features))
    return torch.cat(scores, dim=1)


def assert_streams_end_anywhere(model: LanguageModel) -> None:
    """The scores of streams that end inside an update of 15 tokens are those of longer ones, up to their ends."""
    tokens, lengths = random_tokens(3, 15), [15, 9, 1]
    expected = read_streams(model, tokens)
    padded = tokens.masked_fill(torch.arange(15) >= torch.tensor(lengths).unsqueeze(1), 1)
    scores = read_streams(model, padded, lengths=lengths)
    for stream, length in enumerate(lengths):
        torch.testing.assert_close(scores[stream, :length], expected[stream, :length], rtol=0, atol=1e-12)


def assert_fused_is_as_exact(results: Callable[[torch.dtype, str], List[Tensor]]) -> None:
    """What *results* computes by a backend in a dtype: fused attention in float16 is as near to float64 as eager."""
    exact = results(torch.float64, "eager")
    errors = [
        max(float((one - other).norm() / other.norm().clamp(min=1e-6)) for one, other in zip(rough, exact, strict=True))
        for rough in (results(torch.float16, "fused"), results(torch.float16, "eager"))
    ]
    assert errors[0] < max(2 * errors[1], 0.01)


def read_texts(model: LanguageModel, tokens: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
    """Return the scores of whole texts ``tokens [B, T]``, each read from an empty memory."""
    return model.output_layer(model.read_text(tokens, lengths))


def whole_segments(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Return features of ``tokens [B, T]`` by the pass over segments, the last one filled up with more tokens."""
    total = tokens.size(1)
    filled = torch.cat([tokens, random_tokens(len(tokens), -total % model.segment_length, seed=9)], dim=1)
    return read_features(model, filled)[0][:, :total]


def read_features(model: LanguageModel, tokens: Tensor) -> Tuple[Tensor, MemoryState]:
    """Return features of ``tokens [B, T]``, read from an empty memory segment by segment, and the state after them."""
    state, features = None, []
    for segment in tokens.split(model.segment_length, dim=1):
        passage = model.read_segment(segment, state)
        state = passage.state
        features.append(passage.features)
    return torch.cat(features, dim=1), state


def read_by_token(model: LanguageModel, tokens: Tensor, first: int = 1) -> Tensor:
    """Return the scores of ``tokens [B, T]``, decoded one by one after the *first*."""
    state = DecodingState(model, len(tokens))
    features = [state.read(tokens[:, :first]), *(state.read(new) for new in tokens[:, first:].split(1, dim=1))]
    return model.output_layer(torch.cat(features, dim=1))


@torch.no_grad()
def assert_decoding_follows_reordered_beams(decoder: LanguageModel, length: int = 30, words: int = 6) -> None:
    """Read sequences of unlike lengths, then reorder them before every new word; compare with whole segments."""
    read = [0, 1, 17, 3, 8, 2, 16]
    tokens = random_tokens(len(read), length)
    state = DecodingState(decoder, len(read))
    state.read(tokens[:, : max(read)], read)
    generator = torch.Generator().manual_seed(0)
    for _ in range(words):
        order = torch.randint(len(read), (len(read),), generator=generator)
        state.reorder(order)
        tokens, read = tokens[order], [read[sequence] for sequence in order]
        expected = whole_segments(decoder, tokens)
        new = torch.stack([tokens[sequence, n] for sequence, n in enumerate(read)]).unsqueeze(1)
        features = state.read(new)
        for sequence, n in enumerate(read):
            torch.testing.assert_close(features[sequence, 0], expected[sequence, n], rtol=0, atol=1e-9)
        read = [n + 1 for n in read]


def assert_updates_change_the_gradient_alone(make: Callable[..., LanguageModel]) -> None:
    """Models that read one segment an update, or three, have the same scores; the gradient of three reaches farther.

    *make* takes the options that tell the models apart.
    """
    one, three = (make(segment_length=2 * k, bptt_segments=k) for k in (1, 3))
    assert one.memory.period == three.memory.period == 2
    tokens = random_tokens(2, 17)
    torch.testing.assert_close(read_streams(one, tokens), read_streams(three, tokens), rtol=0, atol=1e-12)
    reached = [reached_by_gradient(decoder, tokens[:, :6]) for decoder in (one, three)]
    assert reached == [[False, False, True], [True, True, True]]


def reached_by_gradient(decoder: LanguageModel, tokens: Tensor) -> List[bool]:
    """Read ``tokens [B, 6]`` in updates; tell which pairs of them the gradient of the last pair's features reaches."""
    x = decoder.embed_tokens(tokens).detach().requires_grad_()
    state, features = decoder.memory.initial_state(x), []
    for update in x.split(decoder.segment_length, dim=1):
        passage = decoder.memory(update, state, decoder.layers, decoder.positions)
        state = passage.state
        features.append(passage.features)
        assert not any(tensor.requires_grad for tensor in state.tensors())
    (gradient,) = torch.autograd.grad(torch.cat(features, dim=1)[:, 4:].logsumexp(-1).sum(), x)
    return [bool(pair.abs().max() > 0) for pair in gradient.split(2, dim=1)]


def assert_one_segment_an_update_is_told(make: Callable[..., LanguageModel], memory: str, caplog: Any) -> None:
    """A training whose updates have one segment is told, once, that nothing trains what *memory* writes."""
    caplog.set_level(logging.WARNING)
    for segments, told in ((2, 0), (1, 1)):
        model = make(segment_length=4, bptt_segments=segments)
        model.read_segment(random_tokens(2, 4), None)
        model.train()
        for _ in range(2):
            model.read_segment(random_tokens(2, 4), None)
        assert caplog.text.count(f"--bptt-segments 1 trains nothing that --memory {memory} writes") == told
