"""Several ranks read the streams that one rank with as many would, and report the sum of what they computed."""

import re

import pytest
import torch

from .helpers import TASK, record_documents, write_data
from .processes import computed, output_of, run_in_processes, train_in_processes, weights

MODEL = [
    "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32,
    "--tokens-per-sample", 16, "--mem-len", 24, "--dropout", 0,
]  # fmt: skip
TRAIN = [*MODEL, "--optimizer", "adam", "--lr", 5e-3, "--no-epoch-checkpoints", "--max-update", 14, "--clip-norm", 0.5]
TEST = 1201  # tokens, for no number of streams below divisible


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An epoch is eleven segments; the last one is one token for the first stream, and padding for the others."""
    folder = write_data(tmp_path_factory.mktemp("data"), train=4 * 16 * 10 + 1, valid=150, test=TEST)
    return record_documents(folder, "train", "valid")


def train(data, folder, ranks, *options, arch="lamemo_lm"):
    command = [data, *TASK, "--arch", arch, *TRAIN, "--batch-size", 4 // ranks, *options]
    assert train_in_processes(command, folder, ranks, dtype="float64") == [0] * ranks, output_of(folder)[-2000:]
    return folder


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    done = {}

    def run(*options, **kwargs):
        key = (*options, *kwargs.items())
        if key not in done:
            done[key] = train(data, tmp_path_factory.mktemp("one"), 1, *options, **kwargs)
        return done[key]

    return run


def losses_and_norms(folder):
    """By update and batch, the sum of losses over ranks; by update, the gradient norm, the same on every rank."""
    losses, norms = {}, {}
    for (update, name), (value,) in computed(folder).items():
        what, value = name.split()[1], float.fromhex(value)
        if what == "norm":
            assert norms.setdefault(update, value) == value
        else:
            losses[update, what] = losses.get((update, what), 0) + value
    return losses, norms


CASES = {
    "roll": ("lamemo_lm", ("--roll",)),
    "update-freq": ("lamemo_lm", ("--update-freq", 3)),
    "transformer-xl": ("transformer_xl_lm", ("--roll",)),
    "ernie-doc": ("ernie_doc_lm", ("--roll", "--position-encoding", "segatron", "--sentence-ends", "w1 w9 w20")),
    "compressive": ("compressive_transformer_lm", ("--update-freq", 2)),
    "infinity-former": (
        "infinity_former_lm",
        ("--num-basis-functions", 8, "--basis-widths", "0.1,0.3", "--kl-weight", 0.01),
    ),
    "documents": ("compressive_transformer_lm", ("--documents", "recorded", "--roll")),
    "memory tokens": ("recurrent_memory_transformer_lm", ("--bptt-segments", 2)),
    "infini": ("infini_attention_lm", ("--bptt-segments", 2, "--roll", "--mem-len", 0)),
    "memorizing": ("memorizing_transformer_lm", ("--store-len", 30, "--retrieved-rows", 5)),
    "associative": ("associative_recurrent_memory_transformer_lm", ("--mem-len", 4)),
    "block-recurrent": ("block_recurrent_transformer_lm", ("--recurrent-states", 5, "--roll")),
}
ON_FOUR = ("update-freq", "infinity-former")  # sums of several batches, and of several losses; others are sums of one


@pytest.mark.parametrize(
    ("arch", "options", "ranks"),
    [
        *(pytest.param(*case, 2, id=f"{name}-2") for name, case in CASES.items()),
        *(pytest.param(*CASES[name], 4, id=f"{name}-4") for name in ON_FOUR),
    ],
)
def test_ranks_equal_one_rank_with_their_streams(arch, options, ranks, data, one_rank, tmp_path):
    expected, found = one_rank(*options, arch=arch), train(data, tmp_path, ranks, *options, arch=arch)
    for one, several in zip(losses_and_norms(expected), losses_and_norms(found), strict=True):
        assert several == pytest.approx(one, rel=1e-10, abs=1e-10)
    others = weights(found)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-10)
    reported = [
        re.findall(r"valid on 'valid' subset \| loss ([\d.]+) .* wpb ([\d.]+)", output_of(folder))
        for folder in (expected, found)
    ]
    assert reported[0] and reported[0] == reported[1]


@pytest.mark.parametrize(("ranks", "streams"), [(3, 5), (4, 1)])
def test_evaluation_is_the_sum_over_ranks(ranks, streams, data, one_rank, tmp_path):
    """Of as many streams on one rank."""
    path = one_rank("--roll", arch="lamemo_lm") / "checkpoints" / "checkpoint_last.pt"

    def evaluate(folder, ranks, streams):
        command = [data, *TASK, "--path", path, "--gen-subset", "test", "--batch-size", streams]
        assert run_in_processes("eval_lm", command, folder, ranks) == [0] * ranks
        text = output_of(folder)
        tokens = re.search(r"Evaluated ([\d,]+) tokens", text).group(1)
        [units] = re.findall(r"\| Units: (.* unknown\))", text)  # the first rank's
        return (
            int(tokens.replace(",", "")),
            units,
            re.search(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", text).groups(),
        )

    def validate(folder, ranks, streams):
        command = [data, *TASK, "--path", path, "--valid-subset", "test", "--batch-size", streams]
        assert run_in_processes("validate", [*command, "--log-format", "simple"], folder, ranks) == [0] * ranks
        loss, tokens = re.findall(r"loss ([\d.]+) .*wpb ([\d.]+)", output_of(folder))[-1]
        return float(tokens), loss

    one, several = (evaluate(tmp_path / f"eval{n}", n, ranks * streams // n) for n in (1, ranks))
    assert one[0] == TEST and several == one
    one, several = (validate(tmp_path / f"valid{n}", n, ranks * streams // n) for n in (1, ranks))
    assert one[0] == TEST and several == one


def test_words_of_all_ranks_are_listed_in_order(data, one_rank, tmp_path):
    path = one_rank("--roll", arch="lamemo_lm") / "checkpoints" / "checkpoint_last.pt"
    command = [data, *TASK, "--path", path, "--gen-subset", "test", "--output-word-probs"]

    def listed(ranks):
        folder = tmp_path / str(ranks)
        assert run_in_processes("eval_lm", [*command, "--batch-size", 4 // ranks], folder, ranks) == [0] * ranks
        lines = re.findall(r"\| (\d+) (\S+ \[.*\])$", output_of(folder), flags=re.MULTILINE)
        assert [int(number) for number, _ in lines] == list(range(len(lines)))
        return [re.fullmatch(r"(\S+) \[(.*)\]", word).groups() for _, line in lines for word in line.split("\t")]

    one, two = listed(1), listed(2)
    assert len(one) == TEST and [word for word, _ in one] == [word for word, _ in two]
    assert [float(p) for _, p in two] == pytest.approx([float(p) for _, p in one], abs=1e-4)
