"""Commands and the hub read prompts of text and write text, with a model of bytes."""

import itertools
import json
import math
import re

import pytest
import torch
from fairseq_cli import generate, interactive, train

from lamemo_fairseq import convert_checkpoint
from lamemo_fairseq import score as score_command
from lamemo_fairseq.core import LanguageModel
from lamemo_fairseq.lm_eval.answers import Answers
from lamemo_fairseq.models.language_models import TransformerXLLanguageModel
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .helpers import TASK, run_command
from .preprocessing import TEXTS, own, write_texts
from .test_commands import TRAIN


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    own(write_texts(folder / "texts"), folder / "data", "--bpe", "bytes")
    return folder / "data"


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_command(
        train.cli_main, data, *TASK, "--arch", "transformer_xl_lm", *TRAIN, "--max-update", 20,
        "--disable-validation", "--save-dir", folder,
    )  # fmt: skip
    return folder


@pytest.fixture
def hub(data, model):
    return TransformerXLLanguageModel.from_pretrained(str(model), "checkpoint_last.pt", str(data))


def lines_of(kind, output):
    return dict(re.findall(rf"^{kind}-(\d+)\t(?:-?[\d.]+\t)?(.*)$", output, flags=re.MULTILINE))


PROMPT = "the w7\xe9,  word</s></s>of 1"


@pytest.mark.parametrize("named", [[], ["--bpe", "bytes"]], ids=["recorded", "named"])
def test_interactive_reads_and_writes_text(named, data, model, tmp_path, capsys):
    (tmp_path / "prompts").write_text(f"{PROMPT}\n", encoding="utf-8")
    run_command(
        interactive.cli_main, data, *TASK, "--path", model / "checkpoint_last.pt", "--input",
        tmp_path / "prompts", "--beam", 1, "--max-len-b", 5, *named,
    )  # fmt: skip
    output = capsys.readouterr().out
    whole = len(PROMPT.replace("</s>", "\n").encode())
    scores = lines_of("P", output)["0"].split()
    assert whole + 1 < len(scores) <= whole + 6
    assert lines_of("H", output)["0"].startswith("t h e \u2581 w 7 \xc3 \xa9 , \u2581 \u2581 w")
    assert lines_of("D", output)["0"].startswith("the w7\xe9,  word </s>  </s> of 1")
    assert lines_of("S", output)["0"].endswith("w o r d </s> </s> o f \u2581 1")


def test_interactive_scores_prompts(data, model, hub, tmp_path, capsys):
    (tmp_path / "prompts").write_text("the w7\xe9\nof\n", encoding="utf-8")
    run_command(
        interactive.cli_main, data, *TASK, "--path", model / "checkpoint_last.pt", "--score-reference",
        *["--input", tmp_path / "prompts", "--buffer-size", 2, "--batch-size", 2],
    )  # fmt: skip
    output = capsys.readouterr().out
    assert lines_of("D", output) == {"0": "the w7\xe9", "1": "of"}
    for row, text in lines_of("D", output).items():
        expected = hub.score(text)["positional_scores"] / torch.tensor(2.0).log()
        found = torch.tensor([float(score) for score in lines_of("P", output)[row].split()])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_shards_together_have_every_line_once(data, model, capsys):
    """Numbers kept, and the continuations of one process."""

    def generated(*options):
        run_command(
            generate.cli_main, data, *TASK, "--path", model / "checkpoint_last.pt", "--gen-subset", "valid",
            *["--beam", 1, "--max-len-b", 3, "--prefix-size", 9, "--batch-size", 8, "--num-workers", 0, *options],
        )  # fmt: skip
        output = capsys.readouterr().out
        assert "BLEU" not in output and re.search(r"^Generate valid .* without a score", output, flags=re.MULTILINE)
        return lines_of("D", output)

    parts = [generated("--num-shards", 3, "--shard-id", i) for i in range(3)]
    assert sum(map(len, parts)) == 40 and all(len(part) >= 13 for part in parts)
    whole = generated()
    assert {row: text for part in parts for row, text in part.items()} == whole
    lines = TEXTS["valid"].decode().splitlines()
    assert all(text.startswith(lines[int(row)][:5]) for row, text in whole.items())
    with pytest.raises(ValueError, match="has 40 lines, fewer than --num-shards 41"):
        generated("--num-shards", 41, "--shard-id", 0)


def task_of(data, **options):
    config = SegmentLanguageModelingConfig(
        data=str(data), tokens_per_sample=8, train_subset="train", dataset_impl=None, **options
    )
    return SegmentLanguageModelingTask.setup_task(config)


def test_shards_of_an_evaluation_together_have_every_token_once(data):
    def targets(**options):
        task = task_of(data, **options)
        batches = task.get_batch_iterator(task.load_dataset("valid"), max_sentences=2).next_epoch_itr(shuffle=False)
        return sorted(
            int(word) for batch in batches for word in batch["target"].flatten() if word != task.dictionary.pad()
        )

    parts = [targets(num_shards=3, shard_id=i) for i in range(3)]
    assert all(parts) and sorted(word for part in parts for word in part) == targets()
    with pytest.raises(ValueError, match="--shard-id 3 is none of --num-shards 3: pass 0 to 2"):
        targets(num_shards=3, shard_id=3)


def test_shards_are_not_for_training(data):
    task = task_of(data, num_shards=2, shard_id=0)
    with task.training_batches(), pytest.raises(ValueError, match="--num-shards 2 is for one process"):
        task.get_batch_iterator(task.load_dataset("train"), max_sentences=2)


def test_a_score_that_is_asked_for_is_printed(data, model, capsys):
    run_command(
        generate.cli_main, data, *TASK, "--path", model / "checkpoint_last.pt", "--gen-subset", "valid",
        *["--beam", 1, "--max-len-b", 3, "--scoring", "bleu"],
    )  # fmt: skip
    assert re.search(r"^Generate valid .*: BLEU", capsys.readouterr().out, flags=re.MULTILINE)


def test_hub_reads_and_writes_text(hub):
    text = "the  w7\xe9 \n\n of <unk>"
    assert len(hub.encode(text)) == len(text.encode()) + 1
    assert hub.decode(hub.encode(text)) == text
    for options in ({"beam": 2}, {"sampling": True, "beam": 2}, {"sampling": True, "sampling_topp": 0.9}):
        prompt = hub.encode("the  w7\xe9")
        for found in hub.generate(prompt, max_len_b=30, min_len=30, no_repeat_ngram_size=2, **options):
            pairs = list(itertools.pairwise(found["tokens"].tolist()))
            assert len(set(pairs)) == len(pairs) == len(prompt) + 29
    assert hub.sample("the  w7\xe9", beam=2, max_len_b=4, no_repeat_ngram_size=2).startswith("the  w7\xe9")
    assert len(hub.score(text)["positional_scores"]) == len(text.encode())


def test_the_core_scores_text_as_the_hub_does(data, model, hub, tmp_path):
    dictionary = str(data / "dict.txt")
    convert_checkpoint.main(["core", str(model / "checkpoint_last.pt"), str(tmp_path), "--dictionary", dictionary])
    core, texts = LanguageModel.load(tmp_path), ["the  w7\xe9 \n\n of w1", "of"]
    for score, expected in zip(core.score(texts), hub.score(texts), strict=True):
        assert torch.equal(score.words, expected["tokens"])
        torch.testing.assert_close(score.log_probs, expected["positional_scores"], rtol=0, atol=1e-5)
    greedy = core.sample("the  w7\xe9", 9, temperature=0, stop_at_end=True)
    assert greedy == hub.sample("the  w7\xe9", beam=1, max_len_b=9)


def test_a_harness_scores_a_text_as_evaluation_does(data, model, tmp_path, capsys):
    checkpoint = str(model / "checkpoint_last.pt")
    score_command.main([str(data), checkpoint, "--subset", "valid", "--batch-size", "1", "--cpu"])
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    convert_checkpoint.main(["core", checkpoint, str(tmp_path), "--dictionary", str(data / "dict.txt")])
    [total] = Answers(LanguageModel.load(tmp_path)).documents([TEXTS["valid"].decode()])
    assert -total / math.log(2) / evaluated["tokens"] == pytest.approx(evaluated["loss"], rel=1e-6)


def test_hub_refuses_what_it_does_not_know(hub):
    for options, message in (
        ({"no_repeat_ngram": 2}, "sample does not know 'no_repeat_ngram': did you mean 'no_repeat_ngram_size'"),
        ({"top_p": 0.9}, "'sampling_topp'"),
        ({"seed": 1}, "call torch.manual_seed"),
        ({"nbest": 3}, "pass beam"),
        ({"beam": 0}, "--beam is 0"),
        ({"prefix_size": 3}, "pass its beginning"),
        ({"score_reference": True}, "call score"),
        ({"temperature": 0.0, "sampling": True}, "--temperature is 0.0"),
        ({"replace_unk": "@@ "}, "--replace-unk copies"),
    ):
        with pytest.raises(ValueError, match=message):
            hub.sample("the", **options)
    for wrong in (3, [3], None):
        for use in (hub.score, hub.sample):
            with pytest.raises(ValueError, match=r"a text is a string, not a (int|NoneType): pass one, or a list"):
                use(wrong)
    with pytest.raises(ValueError, match="score does not know 'beam'"):
        hub.score("the", beam=2)
    with pytest.raises(ValueError, match=r"text 0 holds the word id 5000, but dict.txt has"):
        hub.generate([torch.tensor([5000])])
    assert hub.generate([], beam=2) == [] == hub.sample([])
    allowed = hub.generate(hub.encode("the"), beam=1, max_len_b=3, prefix_allowed_tokens_fn=lambda row, words: [2, 9])
    assert set(allowed[0]["tokens"][3:].tolist()) <= {2, 9}
