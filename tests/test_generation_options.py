"""fairseq's options for generation: each works, or is refused in one line that names it and what to pass."""

import math
from argparse import Namespace

import pytest
import torch
from fairseq import options
from fairseq.dataclass.configs import GenerationConfig

from lamemo_fairseq.host import named_checkpoints
from lamemo_fairseq.host.generation_options import (
    NAMES,
    REFUSED,
    WITHOUT_EFFECT,
    check_generation,
    check_names,
    warn_without_effect,
)

from .helpers import USER_DIR

# Options that do what fairseq says, beside those of the two lists.
WORKING = {
    "beam", "nbest", "max_len_a", "max_len_b", "min_len", "unnormalized", "lenpen", "unkpen", "score_reference",
    "prefix_size", "no_repeat_ngram_size", "sampling", "sampling_topk", "sampling_topp", "temperature",
    "diverse_beam_groups", "diverse_beam_strength", "diversity_rate", "no_seed_provided",
}  # fmt: skip


def test_every_option_of_fairseqs_stands_in_one_list():
    lists = [WORKING, set(REFUSED), set(WITHOUT_EFFECT)]
    assert sorted(name for names in lists for name in names) == sorted(NAMES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_here_is_refused_by_name(name):
    default = getattr(GenerationConfig(), name)
    given = True if default is False else default + 1 if isinstance(default, (int, float)) else "hard"
    option = name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"^--{option} (is|adds|copies) .*(leave it out|instead|pass)"):
        check_generation(Namespace(**{name: given}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beam": 0}, "--beam is 0: pass 1 or more"),
        ({"beam": -2}, "--beam is -2"),
        ({"nbest": 0}, "--nbest is 0"),
        ({"nbest": 6}, "--nbest 6 is more than --beam 5 finds"),
        ({"min_len": -1}, "--min-len is -1"),
        ({"max_len_a": -0.5}, "--max-len-a is -0.5"),
        ({"max_len_b": -1}, "--max-len-b is -1"),
        ({"min_len": 300}, "--max-len-b 200 allows fewer new words than --min-len 300"),
        ({"prefix_size": -1}, "--prefix-size is -1"),
        ({"no_repeat_ngram_size": -1}, "--no-repeat-ngram-size is -1"),
        ({"temperature": 0.0}, "--temperature is 0.0: pass a positive number"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"temperature": 1e-40}, "--temperature is 1e-40: pass a positive number, 1e-30 or more"),
        ({"lenpen": math.nan}, r"--lenpen is nan: pass a number between -1e\+30 and 1e\+30"),
        ({"unkpen": math.nan}, "--unkpen is nan"),
        ({"unkpen": -math.inf}, "--unkpen is -inf"),
        ({"max_len_a": math.inf}, "--max-len-a is inf"),
        ({"diversity_rate": 1e39}, r"--diversity-rate is 1e\+39"),
        ({"diverse_beam_groups": 5, "diverse_beam_strength": math.inf}, "--diverse-beam-strength is inf"),
        ({"sampling_topk": 5}, "--sampling-topk is for sampling"),
        ({"sampling_topp": 0.9}, "--sampling-topp is for sampling"),
        ({"sampling": True, "sampling_topk": -3}, "--sampling-topk is -3"),
        ({"sampling": True, "sampling_topp": 1.5}, "--sampling-topp is 1.5"),
        ({"sampling": True, "sampling_topp": 0.0}, "--sampling-topp is 0.0"),
        ({"sampling": True, "sampling_topp": 0.9, "sampling_topk": 5}, "one of --sampling-topk and --sampling-topp"),
        ({"sampling": True, "diverse_beam_groups": 5}, "--sampling and --diverse-beam-groups are different"),
        ({"diversity_rate": 0.0, "diverse_beam_groups": 5}, "--diverse-beam-groups and --diversity-rate are"),
        ({"diverse_beam_groups": 2}, "--beam 5 has to be divisible by --diverse-beam-groups 2"),
        ({"diverse_beam_strength": 2.0}, "pass --diverse-beam-groups with it"),
        ({"diverse_beam_groups": 5, "diverse_beam_strength": -1.0}, "--diverse-beam-strength is -1.0"),
        ({"diversity_rate": -0.5}, "--diversity-rate is -0.5"),
        (
            {"score_reference": True, "prefix_size": 3},
            "--prefix-size generates text and --score-reference scores given text",
        ),
        (
            {"score_reference": True, "sampling": True},
            "--sampling generates text and --score-reference scores given text",
        ),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_generation(Namespace(**given))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"min_len": 300, "max_len_a": 2.0},
        {"sampling": True, "sampling_topk": 0, "beam": 3, "nbest": 3},
        {"sampling": True, "sampling_topp": 1.0},
        {"diverse_beam_groups": 5, "diverse_beam_strength": 0.2, "nbest": 5},
        {"diversity_rate": 0.0},
        {"unkpen": math.inf, "lenpen": -2.0, "temperature": 1e-30},
        {"no_early_stop": True, "sacrebleu": True, "unnormalized": True},
        {"score_reference": True},
    ],
    ids=str,
)
def test_what_makes_sense_is_accepted(given):
    check_generation(Namespace(**given))
    check_generation(GenerationConfig(**given))


@pytest.mark.parametrize("name", ["temperature", "lenpen", "unnormalized", "unkpen", "min_len", "no_repeat_ngram_size"])
def test_options_of_new_words_have_no_effect_on_given_text(name, caplog):
    warn_without_effect(Namespace(**{name: 2}))
    assert not caplog.messages
    warn_without_effect(Namespace(score_reference=True, **{name: 2}))
    option = "--" + name.replace("_", "-")
    assert caplog.messages == [f"{option} has no effect: --score-reference scores given text"]


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"sample does not know 'top_p': did you mean .*'sampling_topp'"):
        check_names(["beam", "top_p"], NAMES, "sample")
    with pytest.raises(ValueError, match=r"'seed': call torch.manual_seed before it"):
        check_names(["seed"], NAMES, "sample")
    with pytest.raises(ValueError, match=r"does not know 'xyzzy': it knows .*max_len_b"):
        check_names(["xyzzy"], NAMES, "sample")


def parsed(task, *words):
    parser = options.get_interactive_generation_parser()
    parser.set_defaults(distributed_world_size=4)  # as on a machine with four GPUs
    return options.parse_args_and_arch(
        parser, ["data", "--user-dir", USER_DIR, "--task", task, "--path", "c.pt", *words]
    )


def test_one_process_generates_without_a_score(monkeypatch):
    monkeypatch.setattr(named_checkpoints, "_files", lambda options: [])  # of --path
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = parsed("segment_language_modeling")
    assert (found.distributed_world_size, found.scoring) == (1, "no_score")
    found = parsed("segment_language_modeling", "--distributed-world-size", "2", "--scoring=bleu")
    assert (found.distributed_world_size, found.scoring) == (2, "bleu")
    found = parsed("language_modeling")
    assert (found.distributed_world_size, found.scoring) == (4, "bleu")


def test_torchrun_does_not_generate(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun, or fairseq-generate 2 times with --num-shards 2"):
        parsed("segment_language_modeling", "--cpu")
