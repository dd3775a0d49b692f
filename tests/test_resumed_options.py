"""Whatever an option keeps in the trainer, a run stopped in the middle goes on with, to the last bit."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from lamemo_fairseq.host.restoring import _PRECISION, _kind_of_state

from .resuming import ADAM, PLATEAU, SEGMENTS, configured, read, train, two_folders

AVERAGED = ["--store-ema", "--ema-decay", 0.8]
EMA = [*ADAM, *AVERAGED]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_folders(tmp_path_factory.mktemp("data"))


def differences(one, other, name=""):
    """The names of all that differs, down to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{name}/{key}")
            else:
                yield f"{name}/{key}"
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{name}/{index}")
    elif torch.is_tensor(one) and torch.is_tensor(other):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield name
    elif one != other:
        yield name


def all_that_counts(folder):
    """A checkpoint without the options and what tells the time."""
    state = read(folder)
    del state["cfg"], state["extra_state"]["metrics"], state["extra_state"]["previous_training_time"]
    state["optimizer_history"] = state["optimizer_history"][-1]
    return state


CASES = {
    "adamax, cosine with restarts, averages seldom": [
        "--optimizer", "adamax", "--lr", 5e-3, "--lr-scheduler", "cosine", "--lr-period-updates", 4, "--t-mult", 2,
        "--lr-shrink", 0.5, "--warmup-updates", 2, *AVERAGED, "--ema-update-freq", 3,
    ],
    "adagrad, fixed with annealing, averages from later on in float32 behind bfloat16": [
        "--optimizer", "adagrad", "--lr", "5e-3,4e-3", "--lr-scheduler", "fixed", "--force-anneal", 2,
        "--warmup-updates", 7, "--bf16", *AVERAGED, "--ema-fp32", "--ema-start-update", 5, "--ema-update-freq", 5,
    ],
    "nag, triangular, float16": [
        "--optimizer", "nag", "--momentum", 0.9, "--lr", 1e-3, "--lr-scheduler", "triangular", "--max-lr", 1e-2,
        "--lr-period-updates", 6, "--shrink-min", "--fp16", "--memory-efficient-fp16", "--fp16-init-scale", 64,
        "--fp16-scale-window", 5,
    ],
    "adafactor, three stages, several segments an update": [
        "--optimizer", "adafactor", "--beta1", 0.9, "--scale-parameter", "--lr", 5e-3, "--lr-scheduler", "tri_stage",
        "--warmup-steps", 2, "--hold-steps", 4, "--decay-steps", 6, "--update-freq", "1,2,3", "--clip-norm", 0.1,
        "--sentence-avg",
    ],
    "adadelta, steps, the best ones": [
        "--optimizer", "adadelta", "--lr", 1, "--lr-scheduler", "step", "--lr-deacy-period", 3, "--warmup-updates", 2,
        "--keep-best-checkpoints", 2, "--validate-after-updates", 5, "--patience", 30,
    ],
    "sgd, by hand, several folders": [
        "--optimizer", "sgd", "--momentum", 0.9, "--lr", 5e-3, "--lr-scheduler", "manual", "--epoch2lr", "{'2':2e-3}",
        "--update2lr", "{'3':3e-3,'8-9':1e-3}",
    ],
    "polynomial with annealing": [
        *ADAM, "--lr-scheduler", "polynomial_decay", "--force-anneal", 2, "--total-num-update", 30,
        "--warmup-updates", 2,
    ],
    "look-ahead in the second of three layers, in every fourth segment": [
        *ADAM, "--decoder-layers", 3, "--lookahead-from-layer", 2, "--lookahead-every", 4,
    ],
    "plateau": [*ADAM, *PLATEAU, "--lr-patience", 1, "--max-update", 20],
    "plateau after a warm-up": [*ADAM, *PLATEAU, "--warmup-updates", 8],
    "the least rate, reached inside an epoch": [
        *ADAM, "--lr-scheduler", "cosine", "--lr-period-updates", 40, "--stop-min-lr", 4.6e-3, "--max-update", 26,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_goes_on_to_the_last_bit(name, data, tmp_path):
    cfg = configured(data / "1", *CASES[name])
    if "several folders" in name:  # an epoch each
        cfg.task.data = os.pathsep.join(str(data / number) for number in "12")
    train(cfg, tmp_path / "whole")
    expected = all_that_counts(tmp_path / "whole")
    inside, edge = "checkpoint_*_8.pt", "checkpoint2.pt"
    for pattern in (inside, edge):
        (stopped,) = (tmp_path / "whole").glob(pattern)
        resumed = tmp_path / stopped.stem
        resumed.mkdir()
        shutil.copy(stopped, resumed / "checkpoint_last.pt")
        train(cfg, resumed)
        assert list(differences(expected, all_that_counts(resumed))) == [], stopped.name


@pytest.mark.parametrize(
    ("stop", "later"),
    [
        (["--max-epoch", 3], ["--max-epoch", 5]),
        (["--max-epoch", 9, "--force-anneal", 3, "--lr-shrink", 0.1, "--stop-min-lr", 1e-3], ["--stop-min-lr", 1e-5]),
        (["--max-epoch", 9, *PLATEAU, "--stop-min-lr", 2.6e-3], ["--stop-min-lr", 7e-4]),
    ],
    ids=["epochs", "least rate", "least rate of a plateau"],
)
def test_the_last_epoch_is_saved_whatever_the_interval(stop, later, data, tmp_path):
    """fairseq saves every --save-interval epochs, and lost what came after the last of them."""
    options = [*ADAM, *stop, "--max-update", 0, "--save-interval-updates", 0, "--save-interval"]
    train(configured(data / "1", *options, 4), tmp_path / "seldom")
    train(configured(data / "1", *options, 1), tmp_path / "often")
    often, seldom = all_that_counts(tmp_path / "often"), all_that_counts(tmp_path / "seldom")
    assert list(differences(often, seldom)) == []
    assert seldom["optimizer_history"]["num_updates"] % (4 * SEGMENTS) != 0
    train(configured(data / "1", *options, 4, *later), tmp_path / "seldom")
    train(configured(data / "1", *options, 1, *later), tmp_path / "whole")
    assert list(differences(all_that_counts(tmp_path / "whole"), all_that_counts(tmp_path / "seldom"))) == []


@pytest.mark.parametrize("options", [[], ["--bf16", "--ema-fp32"]])
def test_averages_are_those_of_the_weights(options, data, tmp_path):
    """Also of the embeddings, which are the output's as well. fairseq's own averaged what has two names twice."""
    train(configured(data / "1", *EMA, *options, "--save-interval-updates", 1, "--max-update", 5), tmp_path)
    weights = [read(tmp_path, f"checkpoint_1_{update}.pt")["model"] for update in range(1, 6)]
    averages = read(tmp_path)["extra_state"]["ema_fp32_params" if options else "ema"]
    assert torch.equal(weights[0]["decoder.output.weights.0"], weights[0]["decoder.embed_tokens.tables.0.weight"])
    for name, average in averages.items():
        expected = weights[0][name].double()
        for later in weights[1:]:
            expected = 0.8 * expected + 0.2 * later[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("options", [[], ["--bf16", "--ema-fp32"]])
def test_averages_may_begin_at_a_resume(options, data, tmp_path):
    train(configured(data / "1", *ADAM, *options, "--max-update", 4), tmp_path)
    train(configured(data / "1", *EMA, *options, "--save-interval-updates", 1, "--max-update", 5), tmp_path)
    before, after = (read(tmp_path, f"checkpoint_1_{update}.pt")["model"] for update in (4, 5))
    for name, average in read(tmp_path)["extra_state"]["ema_fp32_params" if options else "ema"].items():
        expected = 0.8 * before[name].double() + 0.2 * after[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7, msg=name)


def test_a_checkpoint_from_before_the_options_of_look_ahead(data, tmp_path):
    train(configured(data / "1", *ADAM, "--max-update", 4), tmp_path)
    before = read(tmp_path)
    layout = before["extra_state"]["train_iterator"]["layout"]
    assert layout.pop("--lookahead-from-layer") == layout.pop("--lookahead-every") == 1
    for name in ("lookahead_from_layer", "lookahead_every"):
        del before["cfg"]["model"][name]
    torch.save(before, tmp_path / "checkpoint_last.pt")
    train(configured(data / "1", *ADAM, "--max-update", 5), tmp_path)
    assert read(tmp_path)["optimizer_history"][-1]["num_updates"] == 5


def test_a_memory_saved_before_an_option_was_in_the_layout(data, tmp_path):
    """The value is that of the checkpoint's configuration, not the option's default."""
    options = [*ADAM, "--arch", "compressive_transformer_lm", "--mem-len", 4, "--compressed-len"]
    train(configured(data / "1", *options, 3, "--max-update", 4), tmp_path)
    before = read(tmp_path)
    assert before["extra_state"]["train_iterator"]["layout"].pop("--compressed-len") == 3
    torch.save(before, tmp_path / "checkpoint_last.pt")
    with pytest.raises(ValueError, match=r"--compressed-len is 5, there it was 3\. .*--reset-dataloader"):
        train(configured(data / "1", *options, 5, "--max-update", 5), tmp_path)
    train(configured(data / "1", *options, 3, "--max-update", 5), tmp_path)
    assert read(tmp_path)["optimizer_history"][-1]["num_updates"] == 5


def test_t5_biases_of_before_begin_a_run_but_no_optimizer_goes_on(data, tmp_path):
    options = [*EMA, "--arch", "transformer_xl_lm", "--position-encoding", "t5", "--max-update"]
    train(configured(data / "1", *options, 4), tmp_path)
    former = read(tmp_path)
    weights = former["model"]["decoder.positions.table"].clone()
    for stored in (former["model"], former["extra_state"]["ema"]):
        stored["decoder.positions.bias"] = 128 * stored.pop("decoder.positions.table")
    path = tmp_path / "checkpoint_last.pt"
    torch.save(former, path)
    with pytest.raises(ValueError, match=r"--position-encoding t5 in the form of an older version.*--reset-optimizer"):
        train(configured(data / "1", *options, 5), tmp_path)
    tuned = [*options, 1, "--lr", 1e-9, "--finetune-from-model", path]
    train(configured(data / "1", *tuned), tmp_path / "tuned")
    torch.testing.assert_close(read(tmp_path / "tuned")["model"]["decoder.positions.table"], weights)
    train(configured(data / "1", *options, 3, "--reset-optimizer"), tmp_path)
    assert set(read(tmp_path)["extra_state"]["ema"]) == set(read(tmp_path)["model"])


def test_a_checkpoint_without_the_count_of_averages(data, tmp_path, caplog):
    """As former versions saved them."""
    train(configured(data / "1", *EMA, "--ema-update-freq", 3, "--max-update", 2), tmp_path)
    path = tmp_path / "checkpoint_last.pt"
    state = read(tmp_path)
    del state["extra_state"]["SegmentLanguageModelingTask"]["averages"]
    torch.save(state, path)
    train(configured(data / "1", *EMA, "--ema-update-freq", 3, "--max-update", 3), tmp_path)
    assert "does not say how long ago its averages were updated: --ema-update-freq counts from here" in caplog.text


@pytest.mark.parametrize(
    "changed, then, remedy",
    [
        (["--criterion", "chunked_cross_entropy"], "with cross_entropy", "--reset-optimizer"),
        (["--optimizer", "sgd"], "with adam", "--reset-optimizer"),
        (["--bf16"], "without it", "--reset-optimizer"),
        (["--untie-output"], "without it", "--reset-optimizer"),
        (["--optimizer", "adafactor", "--beta1", 0.9], "with None", "--reset-optimizer"),
        (["--lr-scheduler", "inverse_sqrt", "--warmup-updates", 2], "with fixed", "--reset-lr-scheduler"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_state_of_another_kind_is_refused_and_can_begin_anew(changed, then, remedy, data, tmp_path):
    before = changed[:2] if "--beta1" in changed else []
    train(configured(data / "1", *ADAM, *before, "--max-update", 2), tmp_path)
    options = [*ADAM, *changed, "--max-update", 3]
    difference = rf"{changed[len(before)]} is .*, the checkpoint was trained {then}"
    message = rf"{difference}\. Go on with the former, or pass {remedy} to"
    with pytest.raises(ValueError, match=message):
        train(configured(data / "1", *options), tmp_path)
    train(configured(data / "1", *options, remedy), tmp_path)
    state = read(tmp_path)
    assert state["optimizer_history"][-1]["num_updates"] == 3
    if "inverse_sqrt" in changed:
        assert state["last_optimizer_state"]["param_groups"][0]["lr"] == pytest.approx(5e-3 * (2 / 3) ** 0.5)


@pytest.mark.parametrize(
    "optimizer, changed, expected",
    [
        ("adam", ["--weight-decay", 0.1, "--adam-betas", "(0.5, 0.9)"], {"weight_decay": 0.1, "betas": (0.5, 0.9)}),
        ("sgd", ["--momentum", 0.9, "--lr", 1e-3], {"momentum": 0.9, "lr": 1e-3}),
    ],
)
def test_options_of_the_optimizer_may_change(optimizer, changed, expected, data, tmp_path):
    """fairseq alone goes on with those of the checkpoint."""
    options = ["--optimizer", optimizer, "--lr", 5e-3]
    train(configured(data / "1", *options, "--max-update", 2), tmp_path)
    for update, given in ((3, []), (4, ["--optimizer-overrides", "{'weight_decay': 0.2}"])):
        train(configured(data / "1", *options, *changed, *given, "--max-update", update), tmp_path)
        [group] = read(tmp_path)["last_optimizer_state"]["param_groups"]
        expected = {**expected, **({"weight_decay": 0.2} if given else {})}
        assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("update", [4, SEGMENTS], ids=["inside an epoch", "at its end"])
@pytest.mark.parametrize("schedule", [PLATEAU, [*PLATEAU, "--warmup-updates", 3], ["--lr-scheduler", "step"]], ids=str)
def test_another_rate_is_taken(schedule, update, data, tmp_path):
    """Plateaus lower the optimizer's rate, which was the checkpoint's."""
    options = ["--optimizer", "adam", *schedule, "--lr-patience", 9] if "step" not in schedule else [*ADAM, *schedule]
    for rate, updates in ((5e-3, update), (1e-3, update + 2)):
        train(configured(data / "1", *options, "--lr", rate, "--max-update", updates), tmp_path)
    [group] = read(tmp_path)["last_optimizer_state"]["param_groups"]
    assert group["lr"] == pytest.approx(1e-3)


def test_kinds_of_state_are_those_of_fairseq():
    """fp16 on a CPU is refused, so that no training can tell."""
    none = dict.fromkeys(_PRECISION, False)
    kinds = [
        [{}],
        [{"fp16": True}],
        [{"bf16": True}, {"fp16": True, "fp16_no_flatten_grads": True}],
        [{"fp16": True, "memory_efficient_fp16": True}, {"bf16": True, "memory_efficient_bf16": True}],
        [{"amp": True}],
    ]
    found = [{_kind_of_state(SimpleNamespace(**{**none, **given})) for given in same} for same in kinds]
    assert all(len(kind) == 1 for kind in found) and len(set.union(*found)) == len(kinds)


def test_finetuning_takes_the_averages_that_are_named(data, tmp_path):
    options = [*EMA, "--max-update", 2, "--disable-validation"]
    train(configured(data / "1", *options), tmp_path / "one")
    train(configured(data / "1", *options, "--seed", 2), tmp_path / "other")
    one, other = (tmp_path / name / "checkpoint_last.pt" for name in ("one", "other"))
    tuned = [*options, "--finetune-from-model", one, "--ema-seed-model", other, "--ema-decay", 1]
    train(configured(data / "1", *tuned), tmp_path / "tuned")
    averages, wanted = (read(tmp_path / name)["extra_state"]["ema"] for name in ("tuned", "other"))
    assert list(differences(averages, wanted)) == []


@pytest.mark.parametrize("options", [[], ["--bf16", "--ema-fp32"]])
def test_finetuning_takes_no_averages_of_the_run_before(options, data, tmp_path):
    """Of a short run, they would be most of the result."""
    options = [*EMA, *options, "--max-update", 2, "--disable-validation"]
    train(configured(data / "1", *options), tmp_path / "one")
    one = tmp_path / "one" / "checkpoint_last.pt"
    train(configured(data / "1", *options, "--finetune-from-model", one, "--ema-decay", 1), tmp_path / "tuned")
    weights, tuned = read(tmp_path / "one")["model"], read(tmp_path / "tuned")["extra_state"]
    for name, average in tuned["ema_fp32_params" if "--bf16" in options else "ema"].items():
        assert torch.equal(average, weights[name].to(average.dtype)), name


def test_a_run_that_goes_on_does_not_tune_itself(data, tmp_path):
    """fairseq goes on with a last checkpoint, also if it is the one to tune."""
    options = [*EMA, "--disable-validation"]
    tuned = [*options, "--finetune-from-model", tmp_path / "two" / "checkpoint_last.pt"]
    for name, runs in (("one", [(options, 4)]), ("two", [(options, 2), (tuned, 4)])):
        for given, updates in runs:
            train(configured(data / "1", *given, "--max-update", updates), tmp_path / name)
    assert list(differences(*(all_that_counts(tmp_path / name) for name in ("one", "two")))) == []
