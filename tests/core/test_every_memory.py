"""Every registered memory trains, evaluates, decodes, samples and is configured, with the core alone."""

import json
from contextlib import nullcontext

import pytest
import torch

from lamemo_fairseq.core import MEMORIES, LanguageModel, ModelConfig, advance

from .helpers import (
    VARIANTS,
    config_of,
    first_of_each_memory,
    random_tokens,
    read_streams,
    read_texts,
    tiny_decoder,
    tiny_options,
    whole_segments,
)

every_memory = pytest.mark.parametrize("memory", MEMORIES.names())
variants = pytest.mark.parametrize("variant", VARIANTS, ids="-".join)


@every_memory
def test_a_memory_has_a_variant_which_runs_these_tests(memory):
    assert memory in {variant[0] for variant in VARIANTS}, f"add a line for {memory} to VARIANTS in tests/core/helpers"


@variants
def test_trains(variant):
    """A text that repeats itself is learnt, by every parameter; by what writes a memory, from segment to segment."""
    sizes = {"segment_length": 8, "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24}
    sizes["bptt_segments"] = 2 if MEMORIES[variant[0]].carries_gradient else 1
    torch.manual_seed(0)
    model = LanguageModel(config_of(11, **tiny_options(variant, sizes)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    text = 4 + torch.arange(2 * (25 * 8 + 1)).view(2, -1) % 7
    state, losses, learning = None, [], set()
    for start in range(0, text.size(1) - 1, 8):
        segment = text[:, start : start + 9]
        features, state, extra = model(segment[:, :-1], state)
        assert bool(extra) <= MEMORIES[variant[0]].has_losses
        loss = model.loss(features, segment[:, 1:]) / 16
        losses.append(loss.item())
        optimizer.zero_grad()
        sum(extra.values(), loss).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        learning |= {name for name, gradient in gradients.items() if gradient.any()}
        optimizer.step()
    assert learning == set(gradients)
    assert losses[-1] < losses[0] / 2


@variants
@pytest.mark.parametrize(
    "options", [{}, {"adaptive_softmax_cutoff": "6,11", "adaptive_input": True, "untie_output": True}]
)
@pytest.mark.usefixtures("nan_buffers")
def test_every_parameter_has_an_initial_value(variant, options):
    model = LanguageModel(config_of(17, **tiny_options(variant, options)))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@variants
@torch.no_grad()
def test_evaluates_with_the_memory_carried_from_segment_to_segment(variant):
    model, tokens = tiny_decoder(variant), random_tokens(2, 16)
    scores = read_streams(model, tokens)
    torch.testing.assert_close(scores, read_texts(model, tokens), rtol=0, atol=1e-12)
    alone = read_texts(model, tokens[:, -4:-1])
    assert torch.allclose(scores[:, -4:-1], alone) == (variant[0] == "none")


@variants
def test_training_without_dropout_reads_as_evaluation_does(variant):
    """A model is evaluated as it was trained, also where an update has several segments."""
    carries, tokens, read = MEMORIES[variant[0]].carries_gradient, random_tokens(2, 16), []
    model = tiny_decoder(variant, segment_length=6 if carries else 3, bptt_segments=2 if carries else 1)
    for training in (True, False):
        state, features = None, []
        for segment in tokens.split(model.segment_length, dim=1):
            with torch.set_grad_enabled(training):
                of_segment, state, _ = model.train(training)(segment, state)
            features.append(of_segment)
        read.append(torch.cat(features, dim=1))
    torch.testing.assert_close(*read, rtol=0, atol=1e-9)


@variants
def test_gradients_are_those_of_what_is_computed(variant):
    """By a difference along a direction in all parameters, after a memory that stays as it is."""
    model, tokens, state = tiny_decoder(variant).train(), random_tokens(2, 12), None
    for segment in tokens[:, :9].split(3, dim=1):
        _, state, _ = model(segment, state)
    parameters = list(model.parameters())
    along = [
        torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i))
        for i, p in enumerate(parameters)
    ]

    def moved(step):
        for parameter, direction in zip(parameters, along, strict=True):
            parameter.data += step * direction
        return model.loss(model(tokens[:, 9:], state)[0], tokens[:, 10:].repeat(1, 2)[:, :3])

    gradients = torch.autograd.grad(moved(0), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, along, strict=True) if g is not None)
    above, below = moved(1e-6), moved(-2e-6)
    torch.testing.assert_close(slope, (above - below) / 2e-6, rtol=1e-5, atol=1e-5)


LENGTHS = {"compressive": ("compressed_len",), "memorizing": ("store_len",), "token": ("memory_tokens",)}


@every_memory
@torch.no_grad()
def test_a_state_of_more_rows_than_the_options_say_is_refused(memory):
    """Its tokens would attend further than those that the model was asked for; a state of fewer rows may still fill."""
    variant, tokens = first_of_each_memory()[memory], random_tokens(2, 3)
    model = tiny_decoder(variant)
    limits = ("mem_len",) * (model.memory.slots > 0) + LENGTHS.get(memory, ())
    short = full_state(model, tokens)
    for name in limits:
        longer = tiny_decoder(variant, **{name: 9})
        state = full_state(longer, tokens)
        option, limit = "--" + name.replace("_", "-"), tiny_options(variant, {})[name]
        rows, _ = longer.memory.rows_held(state)[option]
        message = rf"^the state has {rows} rows a layer, and {option} is {limit}: pass what"
        fills = [t.shape for t in state.tensors()] != [t.shape for t in short.tensors()]
        for given in (state, advance(state, 2, cleared=[1])):
            with pytest.raises(ValueError, match=message) if fills else nullcontext():
                model(tokens, given)


def full_state(model, tokens):
    """The state after as many segments as fill a memory, which the model itself goes on to read."""
    state = None
    for _ in range(9):
        _, state, _ = model(tokens, state)
    model(tokens, state)
    return state


@every_memory
@torch.no_grad()
def test_a_state_of_another_number_of_layers_is_refused(memory):
    variant, tokens = first_of_each_memory()[memory], random_tokens(2, 3)
    _, state, _ = tiny_decoder(variant, decoder_layers=3)(tokens)
    model = tiny_decoder(variant)
    if memory == "none":
        model(tokens, state)
    else:
        with pytest.raises(
            ValueError, match=r"^the state has \w+ of [23] layers, and this model of [12]: pass what a mod"
        ):
            model(tokens, state)


@variants
@torch.no_grad()
def test_generates_the_most_probable_words(variant):
    """One after the other, across segments; the texts have prompts of other lengths."""
    model, prompts, lengths = tiny_decoder(variant), random_tokens(2, 8), [8, 5]
    generated = model.generate([prompts[row, :length] for row, length in enumerate(lengths)], 7, temperature=0)
    for row, length in enumerate(lengths):
        words = generated.words[row]
        text = torch.cat([prompts[row, :length], words]).unsqueeze(0)
        expected = model.log_probs(whole_segments(model, text))[0, length - 1 : -1]
        assert len(words) == 7 and torch.equal(words, expected.argmax(-1))
        log_probs = expected.gather(1, words.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(generated.log_probs[row], log_probs, rtol=0, atol=1e-9)


@every_memory
@torch.no_grad()
def test_samples_among_the_most_probable_words(memory):
    """The same words with the same seed, others with another."""
    model, first = tiny_decoder(first_of_each_memory()[memory]), random_tokens(3, 1)[:, 0]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(list(first.unsqueeze(1)), 12, temperature=9.0, top_k=4).words)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    texts = torch.cat([first.unsqueeze(1), drawn[0]], dim=1)
    log_probs = model.log_probs(whole_segments(model, texts))[:, :-1]
    ranks = (log_probs > log_probs.gather(2, drawn[0].unsqueeze(2))).sum(2)
    assert ranks.max() < 4 and ranks.any()


@variants
def test_a_configuration_is_plain_values(variant):
    config = config_of(17, **tiny_options(variant, {"adaptive_softmax_cutoff": "6,11"}))
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and type(again.memory_options) is MEMORIES[variant[0]].options


@every_memory
def test_a_memory_without_options_has_its_defaults(memory):
    positions = "disentangled" if MEMORIES[memory].looks_ahead else "transformer-xl"
    config = ModelConfig(17, 4, memory=memory, position_encoding=positions)
    assert config.memory_options == MEMORIES[memory].options()
    assert ModelConfig.from_dict(config.to_dict()) == config


@every_memory
def test_options_of_another_memory_are_refused(memory):
    other = "continuous" if memory != "continuous" else "compressive"
    with pytest.raises(ValueError, match=f"memory_options is a {other.title()}Options, but --memory {memory} takes "):
        ModelConfig(17, 4, memory=memory, memory_options=MEMORIES[other].options())


@pytest.mark.parametrize(("prompts", "training"), [([], False), ([[]], False), ([[1, 2]], True)], ids=str)
def test_what_cannot_be_continued_is_refused(prompts, training):
    model = tiny_decoder().train(training)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first" if training else "at least one word"):
        model.generate([torch.tensor(prompt, dtype=torch.int64) for prompt in prompts], 3)
