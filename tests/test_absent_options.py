"""Options of fairseq's own language models, which users pass by habit, are refused with the reason."""

import re
from dataclasses import fields

import pytest
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from fairseq.tasks.language_modeling import LanguageModelingConfig

from lamemo_fairseq.host.absent_options import ABSENT
from lamemo_fairseq.host.option_rules import EVAL_LM, TRAIN

from .command_lines import read


def test_the_table_has_those_that_models_with_memory_lack():
    known = {action.dest for action in read(TRAIN)[0]._actions}
    fairseqs = {f.name for config in (LanguageModelingConfig, TransformerLanguageModelConfig) for f in fields(config)}
    assert set(ABSENT) == fairseqs - known - {"_name"}


def test_the_reasons_name_options_that_are_there():
    known = {name for action in read(TRAIN)[0]._actions for name in action.option_strings}
    named = {name for reason in ABSENT.values() for name in re.findall(r"(?<!\w)--[\w-]+", reason)}
    assert named - known == {"--future-target", "--nwords"}  # the second is one of preprocess


@pytest.mark.parametrize("command", [TRAIN, EVAL_LM])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--sample-break-mode", "none"],
            r"have no --sample-break-mode \(.* segments of --tokens-per-sample, as with none; .*\): leave it out$",
        ),
        (
            ["--no-token-positional-embeddings", "--self-target", "--seed", 3, "--decoder-learned-pos"],
            r"no --no-token-positional-embeddings and no --decoder-learned-pos \(.*, no --self-target .*: leave them",
        ),
        (["--memm-len", 3, "--max-target-positions=512"], r"have no --max-target-positions \(.*\): leave it out$"),
        (["--max_target_positions", 512], r"have no --max-target-positions \(.*\): leave it out$"),
    ],
)
def test_all_are_refused_in_one_line(command, words, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(command, *words)
    assert len(str(refused.value).splitlines()) == 1
