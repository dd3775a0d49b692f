"""Commands other than fairseq's propose the nearest known name for a misspelt one."""

import pytest

from examples.tables.__main__ import parser as tables
from lamemo_fairseq.analysis.__main__ import parser as analysis
from lamemo_fairseq.convert_checkpoint import _parser as convert
from lamemo_fairseq.score import parser as score
from preprocess.__main__ import parser as preprocess


@pytest.mark.parametrize(
    ("parser", "command", "message"),
    [
        (
            preprocess,
            "own --destdir d --tokeniser words",
            "unrecognized arguments: --tokeniser words: did you mean --to",
        ),
        (preprocess, "own --destdir d --tokenizer wrods", "did you mean words?"),
        (preprocess, "wikitext-13 --destdir d", "did you mean wikitext-103 or wikitext-2?"),
        (preprocess, "enwik8 --destdir d --tokenizer words", "unrecognized arguments: --tokenizer words\n"),
        (score, "data x.pt --mem_len=3", "unrecognized arguments: --mem_len=3: did you mean --mem-len?"),
        (score, "data x.pt --documents seperator", "did you mean separator?"),
        (analysis, "data x.pt --out o --subst valid", "did you mean --subset?"),
        (convert, "core x.pt o --dictionary d --tokeniser moses", "did you mean --tokenizer?"),
        (convert, "exprot x.pt o", "did you mean export"),
        (tables, "table.yaml --pritn row", "did you mean --print"),
    ],
)
def test_the_nearest_name_is_proposed(parser, command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(command.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err
