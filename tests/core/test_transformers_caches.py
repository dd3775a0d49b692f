"""Caches of transformers' models: read on, copied, reordered; and what does not fit them or the model is refused."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from transformers import DynamicCache  # noqa: E402

from lamemo_fairseq.huggingface import LamemoCache  # noqa: E402

from .transformers_cases import close, expected, read, texts, tiny_model  # noqa: E402


@pytest.fixture
def model():
    return tiny_model()


@torch.no_grad()
def test_old_names_of_the_cache_are_taken(model):
    text = texts()[0][None]
    cache = LamemoCache(model)
    output = model(text[:, :5], past_key_values=cache)
    assert output.cache is cache is output.past_key_values
    close(model(text[:, 5:], past_key_values=cache).logits, model(text).logits[:, 5:])


@torch.no_grad()
def test_a_cache_is_repeated_selected_and_begun_anew(model):
    one, two = texts([6, 6, 3])[0], texts([6, 7])[1][:6]
    cache = LamemoCache(model)
    assert cache.batch_size == -1 and cache.get_max_length() == -1 and not cache.is_croppable
    model(torch.stack([one, two]), cache=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    new = texts([4])[0][None]
    logits = model(new.expand(3, -1), cache=cache).logits
    for found, text in zip(logits, (one, one, two), strict=True):
        close(found.log_softmax(-1), expected(model, torch.cat([text, new[0]]))[-4:])
    cache.crop(0)
    for refused in (lambda: cache.crop(1), lambda: cache.update(one, one, 0), lambda: cache.offload(0)):
        with pytest.raises(ValueError, match=r"a memory does not go back|holds the memory of a model as a whole"):
            refused()
    with pytest.raises(ValueError, match="the cache has 3 sequences, and the input 1: pass a new cache"):
        model(new, cache=cache)
    cache.reset()
    close(model(new, cache=cache).logits[0].log_softmax(-1), expected(model, new[0]))


def test_what_is_read_over_a_cache_has_no_gradient(model):
    """The output layer alone would learn."""
    ids = texts()[0][None]
    for options in ({"cache": LamemoCache(model)}, {"use_cache": True}):
        output = model(ids, labels=ids, **options)
        assert not (output.loss.requires_grad or output.logits.requires_grad)


@torch.no_grad()
def test_copies_of_a_cache_go_on_apart_with_the_same_model(model):
    """A prompt is read once, and gone on from in several ways."""
    prompt, one, two = (text[None] for text in texts([7, 5, 4]))
    cache = read(model, prompt)
    copied = copy.deepcopy(cache)
    assert copied.text.model is model.model
    for of, new in ((copied, one), (cache, two)):
        logits = model(new, cache=of, position_ids=torch.arange(7, 7 + new.size(1))[None]).logits
        close(logits[0].log_softmax(-1), expected(model, torch.cat([prompt, new], 1)[0])[7:])
    whole = torch.cat([prompt, one, two], 1)
    words = model.generate(whole, max_new_tokens=3, eos_token_id=None)
    assert torch.equal(model.generate(whole, cache=copied, max_new_tokens=3, eos_token_id=None), words)
    new, mask = torch.cat([one, two], 1), torch.ones_like(whole)
    given = model.generate(new, attention_mask=mask, cache=read(model, prompt), max_new_tokens=3, eos_token_id=None)
    assert torch.equal(given[:, 9:], words[:, 16:])


def other_word(model, ids):
    """A cache that has read the beginning of a text with another second word."""
    read_ids = ids[:, :6].clone()
    read_ids[:, 1] = (read_ids[:, 1] + 1) % 17
    return read(model, read_ids)


@torch.no_grad()
def test_a_cache_knows_its_texts_however_they_were_read(model):
    ids = torch.stack([texts([9])[0], texts([9])[0].roll(1)])
    cache = LamemoCache(model)
    for piece in (ids[:, :3], ids[:, 3:4], ids[:, 4:7]):
        model(piece, cache=cache)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    mixed = ids[torch.tensor([1, 0, 1])]
    options = {"max_new_tokens": 2, "eos_token_id": None, "do_sample": False}
    words = model.generate(mixed, **options)
    with pytest.raises(ValueError, match="do not go on after them"):
        model.generate(ids[torch.tensor([0, 1, 1])], cache=copy.deepcopy(cache), **options)
    assert torch.equal(model.generate(mixed, cache=cache, **options), words)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, ids: m(inputs_embeds=torch.rand(1, 2, 8)), "pass input_ids, and no inputs_embeds"),
        (lambda m, ids: m(ids, cache=DynamicCache()), r"cache is a DynamicCache: pass LamemoCache\(model\)"),
        (
            lambda m, ids: m(ids, attention_mask=torch.ones(1, 1, 9, 9)),
            r"attention_mask is \[1, 1, 9, 9\]: pass \[1, 9\]",
        ),
        (lambda m, ids: m(ids.expand(2, 9), attention_mask=torch.ones(1, 9)), r"is \[1, 9\]: pass \[2, 9\]"),
        (lambda m, ids: m(ids, attention_mask=torch.full((1, 9), -torch.inf).triu(5)), r"is to be added to scores"),
        (
            lambda m, ids: m(ids, attention_mask=torch.ones(1, 12), cache=read(m, ids[:, :2])),
            r"is \[1, 12\]: pass \[1, 9\] or \[1, 11\]",
        ),
        (lambda m, ids: m(ids, cache=read(tiny_model(), ids)), "the cache is of another model"),
        (lambda m, ids: m(ids, position_ids=torch.arange(9).remainder(5)[None]), "a row of its own, padded"),
        (
            lambda m, ids: m.generate(ids[:, 5:], cache=read(m, ids[:, :5])),
            r"has read 5 columns, and input_ids \[1, 4\] do not go on after them",
        ),
        (lambda m, ids: m.generate(ids, cache=read(m, ids)), "with at least one word that is new"),
        (lambda m, ids: m.generate(ids, cache=read(m, ids[:, 4:8])), "do not go on after them: pass the whole texts"),
        (lambda m, ids: m.generate(ids, cache=read(m, ids[:, :4].flip(1))), "do not go on after them: pass the whole"),
        (lambda m, ids: m.generate(ids, cache=other_word(m, ids)), "do not go on after them: pass the whole texts"),
        (lambda m, ids: m(ids, output_attentions=True), "the model has no use for 'output_attentions': leave it out"),
        (lambda m, ids: m(ids + 17), "input_ids have the word ids .*, and the model those from 0 to 16"),
        (lambda m, ids: m.generate(ids + 17), "input_ids have the word ids .*, and the model those from 0 to 16"),
        (lambda m, ids: m(ids[0]), r"input_ids are a tensor \[B, N\] of word ids, not torch.int64 \[9\]"),
        (lambda m, ids: m(ids, token_type_ids=ids), "the model has no use for 'token_type_ids'"),
        (lambda m, ids: m(ids, labels=ids[:, 1:]), r"labels are \[1, 8\], and input_ids \[1, 9\]: pass the same ids"),
        (lambda m, ids: m.train()(ids, cache=LamemoCache(m)), r"call model.eval\(\) first"),
        (lambda m, ids: m.generate(ids, cache_implementation="static"), "cache_implementation chooses among caches"),
        (lambda m, ids: m.resize_token_embeddings(20), "the vocabulary is the dictionary's, and fixed"),
    ],
)
def test_what_a_memory_cannot_do_is_refused(model, use, message):
    with pytest.raises(ValueError, match=message) as refused:
        use(model, texts()[0][None])
    assert "\n" not in str(refused.value)
