"""Requests of evaluation harnesses: against the core's own scores, and through lm-eval where it is installed."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from lamemo_fairseq.core import MEMORIES, TextEncoding, Tokenizer
from lamemo_fairseq.core.text.coders import BYTE_SYMBOLS
from lamemo_fairseq.lm_eval.answers import Answers, Settings, split_words

from .helpers import first_of_each_memory, tiny_decoder

WORDS = [f"w{i}" for i in range(13)]
PAIRS = [("w1 w2 w3 w4 w5 w6 w7", " w8 w9"), ("", "w1 w2"), ("w3 ", "w4 w5 w6 w7 w8"), ("w1\n", "w2"), ("w1 w2", "")]
FIRST = first_of_each_memory()
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


def model_of(memory="lookahead"):
    model = tiny_decoder(FIRST[memory], untie_output=True)
    model.tokenizer = Tokenizer(WORDS)
    return model


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_continuations_have_the_rest_of_the_whole_texts_score(memory):
    model = model_of(memory)
    alone = Answers(model).continuations(PAIRS)
    together = Answers(model, batch_size=3).continuations(PAIRS)
    for (context, continuation), one, other in zip(PAIRS, alone, together, strict=True):
        before = len(model.tokenizer.encode(context.rstrip(" "))) if context else 0
        score = model.score(context + continuation)
        assert one.log_prob == pytest.approx(float(score.log_probs[before:].sum()), abs=1e-9)
        assert other.log_prob == pytest.approx(one.log_prob, abs=1e-9) and other.greedy == one.greedy
    assert alone[-1] == (0.0, True)


def test_what_greedy_decoding_gives_is_greedy():
    model = model_of()
    contexts = ["w1 w2 w3", "w7"]
    given = Answers(model, 2).continued([(context, Settings.of({"max_gen_toks": 5})) for context in contexts])
    for context, text in zip(contexts, given, strict=True):
        drawn = model.generate([context], 5, temperature=0).words[0]
        assert text == model.tokenizer.decode(drawn)
        word = model.tokenizer.encode(text)[-1]
        other = f"w{(int(word) - 4 + 1) % len(WORDS)}"
        answers = Answers(model).continuations([(context, f" {text}"), (context, f" {text.rsplit(' ', 1)[0]} {other}")])
        assert [answer.greedy for answer in answers] == [True, False]


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_documents_are_read_whole_and_alone(memory):
    model = model_of(memory)
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w1 w2", "w1", "", "w5 w6\nw7 w8\n"]
    expected = []
    for text in texts:
        ids = torch.cat([torch.tensor([2]), model.tokenizer.encode(text)])
        state, total = None, 0.0
        for start in range(0, len(ids) - 1, model.segment_length):
            segment = ids[None, start : start + model.segment_length + 1]
            with torch.no_grad():
                features, state, _ = model(segment[:, :-1], state)
                total -= float(model.loss(features, segment[:, 1:]))
        expected.append(total)
    for batch_size in (1, 3):
        assert Answers(model, batch_size).documents(texts) == pytest.approx(expected, abs=1e-9)


def test_a_continuation_ends_before_the_first_string_that_ends_it():
    model = model_of()
    [text] = Answers(model).continued([("w1", Settings.of({"max_gen_toks": 40}))])
    third = text.split()[2]
    settings = Settings.of({"until": ["nowhere", f" {third}"], "max_gen_toks": 40})
    short = Settings.of({"until": " ", "max_gen_toks": 1})
    texts = Answers(model, 3).continued([("w1", settings), ("w1", short), ("w1", settings)])
    assert texts == [text[: text.index(f" {third}")], text.split()[0], texts[0]]


def test_draws_of_a_seed_repeat():
    model, drawn = model_of(), []
    for _ in range(2):
        torch.manual_seed(3)
        drawn += Answers(model).continued(
            [("w1", Settings.of({"do_sample": True, "max_gen_toks": 30, "temperature": 9.0}))]
        )
    torch.manual_seed(4)
    other = Answers(model).continued([("w1", Settings.of({"do_sample": True, "max_gen_toks": 30, "temperature": 9.0}))])
    assert drawn[0] == drawn[1] != other[0]


def test_a_word_across_the_border_belongs_to_the_continuation():
    words = Tokenizer(["ab", "a", "b", "c"])
    assert [ids.tolist() for ids in split_words(words, "c a", "b")] == [[2, 7], [4]]
    assert [ids.tolist() for ids in split_words(words, "c  ", " a")] == [[2, 7], [5]]
    assert [ids.tolist() for ids in split_words(words, "c\n", "a")] == [[2, 7, 2], [5]]
    letters = Tokenizer([BYTE_SYMBOLS[byte] for byte in b"ab "], TextEncoding("none", "bytes"))
    assert [ids.tolist() for ids in split_words(letters, "a ", "b")] == [[2, 4], [6, 5]]


def test_a_continuation_that_the_tokenizer_drops_is_not_certain():
    model = model_of()
    model.tokenizer = Tokenizer(WORDS, TextEncoding("words"))
    with pytest.raises(ValueError, match="tokenizer drops the continuation ' __', which then has no probability"):
        Answers(model).continuations([("w", " w"), ("w", " __")])
    assert Answers(model).continuations([("w", " ")]) == [(0.0, True)]
    with pytest.raises(ValueError, match="tokenizer drops the document '__ _', which then has no probability"):
        Answers(model).documents(["w", "__ _"])
    assert Answers(model).documents([" "]) == [0.0]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_beams": 4}, "num_beams=4 is not served"),
        ({"penalty": 1.0}, "setting 'penalty' is not served"),
        ({"max_gen_toks": -1}, "max_gen_toks is -1"),
        ({"until": 3}, "until is 3"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"do_sample": True, "top_p": 0}, "top_p is 0: pass above 0"),
        ({"temperature": 1e-40}, "temperature is 1e-40: pass 0 for"),
    ],
)
def test_settings_that_are_not_served(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(given)


def test_without_choice_any_top_words_are_taken():
    assert Settings.of({"top_p": 0}).draw == Settings.of({"do_sample": False, "temperature": 0.7, "top_k": 3}).draw


def test_what_answers_need():
    model = tiny_decoder()
    with pytest.raises(ValueError, match="no tokenizer"):
        Answers(model)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Answers(model_of(), 0)


@pytest.fixture
def folder(tmp_path):
    """A saved model, and tasks of lm-eval on documents made here."""
    model_of().save(tmp_path / "model")
    documents = [{"text": "w1 w2 w3 w4 w5\nw6 w7", "last": " w7"}, {"text": "w2 w3 w4 w9", "last": " w9"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
metadata: {{version: 1}}
"""
    tasks = {
        "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
        "cloze": """
output_type: loglikelihood
doc_to_text: "{{text[:text|length - last|length]}}"
doc_to_target: "{{last}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]
""",
        "written": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{last}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    }
    (tmp_path / "tasks").mkdir()
    for name, text in tasks.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"task: {name}{shared}{text}")
    return tmp_path


@needs_lm_eval
def test_tasks_of_the_harness(folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from lamemo_fairseq.lm_eval.model import LamemoLM

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    evaluated = simple_evaluate(
        model="lamemo",
        model_args={"pretrained": str(folder / "model")},
        tasks=["rolling", "cloze", "written"],
        task_manager=manager,
        batch_size=2,
        bootstrap_iters=0,
    )
    assert evaluated is not None
    results, model = evaluated["results"], LamemoLM(str(folder / "model")).model
    texts = ["w1 w2 w3 w4 w5\nw6 w7", "w2 w3 w4 w9"]
    total = -sum(Answers(model, 2).documents(texts))
    words = sum(len(text.split()) for text in texts)
    assert results["rolling"]["word_perplexity,none"] == pytest.approx(
        torch.tensor(total / words).exp().item(), rel=1e-6
    )
    scores = [model.score(text).log_probs[-1] for text in texts]
    assert results["cloze"]["perplexity,none"] == pytest.approx((-torch.stack(scores).mean()).exp().item(), rel=1e-6)


@needs_lm_eval
def test_the_command(folder):
    command = [sys.executable, "-m", "lamemo_fairseq.lm_eval", "--tasks", "cloze", "--include_path", folder / "tasks"]
    command += ["--batch_size", "2"]
    done = subprocess.run(
        [*map(str, command), "--model_args", f"pretrained={folder / 'model'}"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "|cloze" in done.stdout and "perplexity" in done.stdout
    assert "DEBUG" not in done.stderr
    done = subprocess.run([*map(str, command), "--model_args", "pretrained=nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("lm_eval: ") and "nowhere" in done.stderr


@needs_lm_eval
def test_arguments_that_are_not_served(folder):
    from lamemo_fairseq.lm_eval.model import LamemoLM

    pretrained = {"pretrained": str(folder / "model")}
    for given, message in (
        ({**pretrained, "batch_size": "auto"}, "--batch_size auto"),
        ({**pretrained, "dtype": "int8"}, "dtype int8"),
        ({**pretrained, "peft": "x"}, "--model_args peft: it is not known, the names are pretrained, batch_size"),
        ({}, "--model_args has no pretrained=FOLDER"),
    ):
        with pytest.raises(ValueError, match=message):
            LamemoLM.create_from_arg_obj(given, {"device": "cpu"})
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="the device is cuda:0, and there is no GPU: pass --device cpu, and none in"
        ):
            LamemoLM.create_from_arg_obj(pretrained, {"device": "cuda:0"})
    one = LamemoLM.create_from_arg_string(f"pretrained={folder / 'model'},device=cpu", {"device": "cuda:0"})
    assert one.device == torch.device("cpu")


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    from lamemo_fairseq import lm_eval
    from lamemo_fairseq.lm_eval.__main__ import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "lamemo_fairseq.lm_eval.model", raising=False)
    monkeypatch.delattr(lm_eval, "model", raising=False)
    with pytest.raises(SystemExit, match=r"lm_eval: lm-eval is not installed: pip install 'lm-eval>=0.4.13'"):
        main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one process"):
        main()
