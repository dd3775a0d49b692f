"""Texts scored and continued piece by piece, against the pass over whole segments."""

import math

import pytest
import torch

from lamemo_fairseq.core import MEMORIES, LanguageModel, Reader, Tokenizer, advance
from lamemo_fairseq.core.decoding.drawing import Draw
from lamemo_fairseq.core.decoding.sampler import Continuation

from ..gpus import DEVICE
from .helpers import first_of_each_memory, random_tokens, tiny_decoder, whole_segments

SOFTMAXES = [{}, {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True}]
LENGTHS = [23, 2, 9, 1]
WORDS = [f"w{i}" for i in range(13)]  # with fairseq's own, the 17 words of a tiny model


@pytest.fixture
def model() -> LanguageModel:
    model = tiny_decoder()
    model.tokenizer = Tokenizer(WORDS)
    return model


def by_segments(model, text):
    """The log-probability of every word of a text after its first, by the pass over whole segments."""
    with torch.no_grad():
        log_probs = model.log_probs(whole_segments(model, text[None, :-1]))[0]
    return log_probs.gather(1, text[1:, None]).squeeze(1)


@pytest.mark.parametrize("memory", MEMORIES.names())
@pytest.mark.parametrize("options", SOFTMAXES, ids=["full", "adaptive"])
def test_every_word_is_scored_once_in_a_batch_of_texts_of_any_lengths(memory, options):
    model = tiny_decoder(first_of_each_memory()[memory], **options)
    texts = [random_tokens(1, length, seed=length)[0] for length in LENGTHS]
    for text, score in zip(texts, model.score(texts), strict=True):
        assert torch.equal(score.words, text[1:]) and len(score.log_probs) == len(text) - 1
        if len(text) > 1:
            torch.testing.assert_close(score.log_probs, by_segments(model, text), rtol=0, atol=1e-9)


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_pieces_are_scored_like_the_whole_text(memory, monkeypatch):
    monkeypatch.setattr("lamemo_fairseq.core.reader.TOKENS_AT_ONCE", 5)
    model = tiny_decoder(first_of_each_memory()[memory])
    texts = random_tokens(2, 29)
    whole = model.score(list(texts))
    reader, scores = model.reader(2), [[], []]
    first, second = [0, 1, 4, 4, 17, 29], [0, 0, 9, 10, 12, 29]
    for i in range(1, len(first)):
        pieces = [texts[0, first[i - 1] : first[i]], texts[1, second[i - 1] : second[i]]]
        for so_far, score in zip(scores, reader.score(pieces), strict=True):
            so_far.append(score.log_probs)
    for so_far, score in zip(scores, whole, strict=True):
        torch.testing.assert_close(torch.cat(so_far), score.log_probs, rtol=0, atol=1e-9)


def test_what_was_generated_has_the_scores_that_it_was_drawn_with(model):
    prompts = [random_tokens(1, n, seed=n)[0] for n in (7, 1, 4)]
    words, log_probs = model.generate(prompts, 12, temperature=0.8, top_k=5)
    scores = model.score([torch.cat(pair) for pair in zip(prompts, words, strict=True)])
    for drawn, score in zip(log_probs, scores, strict=True):
        torch.testing.assert_close(drawn, score.log_probs[-12:], rtol=0, atol=1e-9)


def test_reading_and_generating_take_turns(model):
    text = random_tokens(1, 11)[0]
    reader = model.reader()
    reader.read(text[:5])
    (first,) = reader.generate(4).words
    (score,) = reader.score(text[5:])
    (then,) = reader.generate(2).words
    whole = model.score(torch.cat([text[:5], first, text[5:], then]))
    torch.testing.assert_close(score.log_probs, whole.log_probs[8:-2], rtol=0, atol=1e-9)
    assert torch.equal(model.score(text).words, text[1:])


def test_a_copy_goes_on_apart_and_texts_may_be_repeated(model):
    text = random_tokens(1, 9)[0]
    reader = model.reader(2)
    reader.read([text[:6], text[:2]])
    twin = reader.copy()
    twin.reorder([0, 0, 1])
    ends = [text[6:], random_tokens(1, 3, seed=4)[0], text[2:]]
    for end, begin, score in zip(ends, (text[:6], text[:6], text[:2]), twin.score(ends), strict=True):
        expected = model.score(torch.cat([begin, end])).log_probs[-len(end) :]
        torch.testing.assert_close(score.log_probs, expected, rtol=0, atol=1e-9)
    assert len(reader) == 2 and len(twin) == 3
    torch.testing.assert_close(reader.score(ends[:1] * 2)[0].log_probs, model.score(text).log_probs[-3:])


def test_a_seed_gives_the_same_words_and_leaves_other_random_numbers_alone(model):
    prompt = torch.tensor([2])
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    begin = torch.rand(1)
    words = model.generate([prompt], 20, seed=7).words[0].tolist()
    stream = model.stream(prompt, 20, seed=7)
    streamed = [next(stream).word]
    middle = torch.rand(1)
    streamed += [token.word for token in stream]
    assert streamed == words == model.generate([prompt], 20, seed=7).words[0].tolist()
    assert torch.equal(torch.cat([begin, middle, torch.rand(2)]), expected)
    assert model.generate([prompt], 20, seed=8).words[0].tolist() != words


def test_seeds_and_scores_hold_on_the_device():
    """On a GPU, kernels draw and steps are graphs."""
    model = tiny_decoder(dtype=torch.float32).to(DEVICE)
    prompts = [torch.tensor([2, 7, 9]), torch.tensor([2])]
    words, log_probs = model.generate(prompts, 20, seed=7)
    assert torch.equal(model.generate(prompts, 20, seed=7).words, words)
    streams = [[token.word for token in model.stream(prompts[0], 20, seed=3)] for _ in range(2)]
    assert streams[0] == streams[1]
    texts = [torch.cat([prompt, new.cpu()]) for prompt, new in zip(prompts, words, strict=True)]
    for score, drawn in zip(model.score(texts), log_probs, strict=True):
        torch.testing.assert_close(score.log_probs[-20:], drawn, rtol=0, atol=1e-3)
    reader, greedy = model.reader(2), Draw(temperature=0)
    reader.read(prompts)
    turns = [reader.generate(n, greedy).words for n in (7, 6)]
    reader.reorder([1, 0])
    turns.append(reader.generate(7, greedy).words[[1, 0]])
    assert torch.equal(torch.cat(turns, dim=1), model.generate(prompts, 20, temperature=0).words)


def test_words_are_streamed_one_by_one_without_end(model):
    stream = model.stream("w1 w2", temperature=0)
    tokens = [next(stream) for _ in range(15)]
    (words,), (log_probs,) = model.generate(["w1 w2"], 15, temperature=0)
    assert [token.word for token in tokens] == words.tolist()
    assert [token.symbol for token in tokens] == [model.tokenizer.symbols[i] for i in words]
    assert [token.log_prob for token in tokens] == log_probs.tolist()
    assert len(list(model.stream("w1", 3))) == 3


def test_strings_are_read_after_the_end_of_a_line(model):
    text = "w1 w2\nw3 nothing"
    score = model.score(text)
    assert score.words.tolist() == [5, 6, 2, 7, 3]
    assert torch.equal(score.log_probs, model.score(torch.tensor([2, 5, 6, 2, 7, 3])).log_probs)
    reader = model.reader()
    pieces = [reader.score(piece)[0].log_probs for piece in ("w1 w2\n", "", "w3 nothing")]
    torch.testing.assert_close(torch.cat(pieces), score.log_probs, rtol=0, atol=1e-9)
    assert math.isclose(model.score([text, "w1"])[0].log_probs.sum(), score.log_probs.sum(), rel_tol=1e-9)
    assert model.score([]) == [] and len(model.score("").words) == 0


def test_one_text_is_continued_like_a_list_of_one(model):
    for prompt in ("w1 w2", torch.tensor([2, 5, 6])):
        assert torch.equal(*(model.generate(given, 5, seed=1).words for given in (prompt, [prompt])))


def test_documents_may_be_strings(model):
    documents = ["w1 w2\nw3", torch.tensor([2, 7, 5]), ""]
    scored = model.score_documents(documents, 2)
    assert [len(scores) for scores in scored] == [4, 2, 0]
    expected = model.score_documents([torch.tensor([2, 5, 6, 2, 7])], 1)[0]
    torch.testing.assert_close(scored[0], expected, rtol=0, atol=1e-12)


def test_samples_are_texts(model):
    one, two = model.sample(["w1", "w2\nw3"], 9, seed=1)
    assert one.startswith("w1") and two.startswith("w2\nw3") and len(two.split("\n", 1)[1].split()) > 1
    assert (
        model.sample("w1", 9, temperature=0) == model.sample(["w1"], 9, temperature=0)[0] and model.sample([], 3) == []
    )
    ends = torch.tensor([[4, 2, 5]])
    model.generate = lambda *options: Continuation(ends, ends)
    assert model.sample("w1", 3) == "w1 w0\nw1" and model.sample("w1", 3, stop_at_end=True) == "w1 w0"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.train().score("w1"), r"call model.eval\(\) first"),
        (lambda m: m.score(torch.tensor([4, 17])), r"has the word ids 4 to 17, and the model those from 0 to 16"),
        (lambda m: m.score(torch.tensor([-1])), r"has the word ids -1 to -1"),
        (lambda m: m.score(torch.rand(3)), r"a string or a tensor \[T\] of word ids, not torch.float32 \[3\]"),
        (lambda m: m.score(torch.tensor([[4]])), r"a string or a tensor \[T\]"),
        (lambda m: m.score([3]), r"a text is a string or a tensor \[T\] of word ids, not a int"),
        (lambda m: m.score(3), r"word ids, not a int: pass one, or a list of them"),
        (lambda m: m.generate(None, 2), r"word ids, not a NoneType: pass one, or a list of them"),
        (lambda m: m.sample(3, 2), r"word ids, not a int: pass one, or a list of them"),
        (lambda m: m.stream(3), r"word ids, not a int: pass one, or a list of them"),
        (lambda m: m.score_documents(3, 2), r"word ids, not a int: pass one, or a list of them"),
        (lambda m: m.reader().read(3), r"word ids, not a int: pass one, or a list of them"),
        (lambda m: m.sample(torch.tensor([4]), 3), "sample continues strings: call generate for texts of word ids"),
        (lambda m: m.reader(2).reorder([0, 5]), "order has 5: pass numbers of texts, 0 to 1"),
        (lambda m: m.reader(2).reorder([-1]), "order has -1: pass numbers of texts, 0 to 1"),
        (lambda m: m.reader(2).reorder([]), "order is empty: pass numbers of texts, 0 to 1"),
        (lambda m: m(torch.tensor([[4, 17]])), "the segment has the word ids 4 to 17, and the model those from 0 to 1"),
        (lambda m: m(torch.tensor([4])), r"a segment is a tensor \[B, N\] of word ids, not torch.int64 \[1\]"),
        (lambda m: m(torch.rand(1, 3)), r"a segment is a tensor \[B, N\] of word ids, not torch.float32 \[1, 3\]"),
        (
            lambda m: m(random_tokens(1, 3)[:, :0]),
            r"a segment is .* word ids, and this one is \[1, 0\]: read no further than",
        ),
        (lambda m: m(random_tokens(1, 3) > 0), r"a segment is a tensor \[B, N\] of word ids, not torch.bool \[1, 3\]"),
        (lambda m: m([[4]]), r"a segment is a tensor \[B, N\] of word ids, not a list"),
        (
            lambda m: m(random_tokens(2, 3), None, torch.tensor([2])),
            r"lengths are \[1\], and the segment \[2, 3\]: pass",
        ),
        (
            lambda m: m(random_tokens(3, 3), m(random_tokens(2, 3)).state),
            "the segment has 3 streams, and the state is of 2: pass the state of the same streams, or None",
        ),
        (
            lambda m: m(random_tokens(3, 3), advance(m(random_tokens(2, 3)).state, 2, [0])),
            "the segment has 3 streams, and the state is of 2",
        ),
        (
            lambda m: m(random_tokens(1, 3), tiny_decoder(("recurrent", "alibi", "right"))(random_tokens(1, 3)).state),
            "the state is a RecurrentState, and --memory lookahead has a LookaheadState: pass what this model has ret",
        ),
        (
            lambda m: m.loss(m(random_tokens(1, 3)).features, torch.tensor([[4, -100, 5]])),
            "the target has the word ids -100 to 5, and the model those from 0 to 16",
        ),
        *(
            (
                lambda m, name=name: getattr(m, name)(m(random_tokens(2, 3)).features, random_tokens(2, 2)),
                r"the target is \[2, 2\], and the features are \[2, 3, 8\]: pass a word id for each token, \[B, N\]",
            )
            for name in ("loss", "target_log_probs")
        ),
        (
            lambda m: m.target_log_probs(m(random_tokens(1, 3)).features, torch.tensor([[4, 5, 17]])),
            "the target has the word ids 4 to 17",
        ),
        (lambda m: m.score_documents("w1 w2", 1), r"reads a list of documents: pass \[TEXT\] for one"),
        (lambda m: m.score_documents([torch.tensor([2, 17])], 1), "a text has the word ids 2 to 17"),
        (
            lambda m: Reader(m, Tokenizer(WORDS[:2])),
            "the tokenizer has 6 words, 4 special ones among them, and the mod",
        ),
        (lambda m: m.generate([], 3), "at least one text"),
        (
            lambda m: m.generate([torch.tensor([], dtype=torch.int64)], 3),
            "at least one word: begin a text with its </s>",
        ),
        (lambda m: m.generate(["w1"], -1), "count is -1: pass the number of new words"),
        (lambda m: m.generate(["w1"], 1, temperature=-1.0), "temperature is -1.0: pass 0 for the most probable"),
        (lambda m: m.generate(["w1"], 1, temperature=1e-40), "temperature is 1e-40: pass 0 .* word, or 1e-30 and more"),
        (lambda m: m.generate(["w1"], 1, top_p=0.0), "top_p is 0.0: pass above 0, and 1 at most"),
        (lambda m: m.generate(["w1"], 1, top_k=-2), "top_k is -2: pass 0 for all words, or how many"),
        (lambda m: m.reader(0), "batch_size is 0, it must be positive"),
        (lambda m: m.reader(2).read("w1"), "reads 2 texts, and pieces of 1 were given: pass a piece of each"),
        (lambda m: next(m.reader(2).stream()), "continues one text, and this reader has 2: call generate"),
        (lambda m: next(m.reader().stream()), "at least one word"),
        (lambda m: Reader(m).read("w1"), r"has no tokenizer: pass word ids, or set model.tokenizer = Tokenizer.load"),
    ],
)
def test_what_makes_no_sense_is_refused(model, use, message):
    with pytest.raises(ValueError, match=message) as refused:
        use(model)
    assert "\n" not in str(refused.value)


def test_a_text_that_is_refused_leaves_the_others_as_they_were(model):
    reader = model.reader(2)
    reader.read([torch.tensor([2, 5]), torch.tensor([2])])
    with pytest.raises(ValueError, match="word ids"):
        reader.score([torch.tensor([6]), torch.tensor([99])])
    score = reader.score([torch.tensor([6]), torch.tensor([7])])[0]
    assert torch.equal(score.log_probs, model.score(torch.tensor([2, 5, 6])).log_probs[1:])
    assert reader.generate(2, Draw(temperature=0)).words.shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "known"),
    [("sample", "did you mean top_p"), ("generate", "did you"), ("stream", "did you"), ("score", "it knows texts$")],
)
def test_a_misspelt_argument_gets_the_nearest_name(model, name, known):
    with pytest.raises(TypeError, match=f"^{name} does not know 'topp': {known}"):
        getattr(model, name)("w1", topp=0.9)
