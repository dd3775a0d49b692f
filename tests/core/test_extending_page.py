"""The code in docs/extending.md registers what works as the shipped ones do."""

import importlib
import sys

import pytest
import torch

from lamemo_fairseq.core import LanguageModel, attention, memory, positions
from lamemo_fairseq.core.attention import BACKENDS, causal_attention
from lamemo_fairseq.core.memory import MEMORIES, FrozenCache
from lamemo_fairseq.core.positions import POSITIONS

from ..extending import files_of_page
from .helpers import config_of, random_tokens, read_by_token, tiny_decoder, tiny_options, whole_segments


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    """The page's names, which other tests must not find. Its modules are imported beside those of the package."""
    registries = [registry._entries for registry in (POSITIONS, MEMORIES, BACKENDS)] + [
        causal_attention._implementations
    ]
    before = [entries.copy() for entries in registries]
    root = tmp_path_factory.mktemp("page")
    for name, text in files_of_page().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    packages = (positions, memory, attention)
    for package in packages:
        package.__path__.append(str(root / package.__name__.replace(".", "/")))
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files_of_page()]
    for module in modules:
        importlib.import_module(module)
    assert [set(now) - set(then) for now, then in zip(registries, before, strict=True)] == [
        *({"linear"}, {"last-inputs", "fading"}, {"double"}, {"double"})
    ]
    yield
    for package in packages:
        package.__path__.pop()
    for module in modules:
        del sys.modules[module]
    for entries, former in zip(registries, before, strict=True):
        entries.clear()
        entries.update(former)


def results(variant, **options):
    """The losses of three segments, their gradients, and what a greedy continuation says."""
    torch.manual_seed(0)
    model = LanguageModel(config_of(17, **tiny_options(variant, options))).double()
    tokens, state, losses = random_tokens(2, 10), None, []
    for start in range(0, 9, 3):
        features, state, _ = model(tokens[:, start : start + 3], state)
        losses.append(model.loss(features, tokens[:, start + 1 : start + 4]))
    torch.stack(losses).sum().backward()
    words, log_probs = model.eval().generate(list(tokens), 7, temperature=0)
    return [*losses, *log_probs, *(p.grad for p in model.parameters() if p.grad is not None)], words


@pytest.mark.parametrize(
    ("mine", "shipped"),
    [
        ((("recurrent", "linear", "right"), {}), (("recurrent", "alibi", "right"), {})),
        ((("lookahead", "linear", "full"), {}), (("lookahead", "alibi", "full"), {})),
        ((("lookahead", "linear", "full"), {"clamp_len": 2}), (("lookahead", "alibi", "full"), {"clamp_len": 2})),
        ((("last-inputs", "transformer-xl", "right"), {}), (("recurrent", "transformer-xl", "right"), {})),
        (
            (("fading", "transformer-xl", "right"), {"slot_share": 1.0}),
            (("recurrent", "transformer-xl", "right"), {}),
        ),
        (
            (("recurrent", "transformer-xl", "right"), {"attention_backend": "double"}),
            (("recurrent", "transformer-xl", "right"), {}),
        ),
    ],
    ids=["positions", "positions to the right", "clamped", "memory", "memory with a cache", "backend"],
)
def test_the_page_adds_what_the_package_has(mine, shipped):
    found, words = results(mine[0], **mine[1])
    expected, same = results(shipped[0], **shipped[1])
    assert len(found) == len(expected) and [w.tolist() for w in words] == [w.tolist() for w in same]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@torch.no_grad()
def test_slots_that_change_need_a_cache_of_their_own(monkeypatch):
    """The page's cache decodes as whole segments do; `FrozenCache` does not, from the second segment on."""
    variant, tokens = ("fading", "transformer-xl", "right"), random_tokens(2, 17)
    decoder = tiny_decoder(variant, slot_share=0.5)
    expected = decoder.output_layer(whole_segments(decoder, tokens))
    torch.testing.assert_close(read_by_token(decoder, tokens), expected, rtol=0, atol=1e-9)
    monkeypatch.setattr(MEMORIES["fading"], "cache", FrozenCache)
    differences = (read_by_token(decoder, tokens) - expected).abs().amax((0, 2))
    assert differences[:3].max() < 1e-9 and differences[3:].min() > 1e-3


def test_options_of_the_page_are_checked():
    with pytest.raises(ValueError, match=r"--slot-share is 2, it must be above 0 and at most 1"):
        tiny_decoder(("fading", "transformer-xl", "right"), slot_share=2)
