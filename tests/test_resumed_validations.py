"""What a resumed run says of other validations and texts, whose values cannot be compared with those before."""

import os
import re
import shutil

import pytest
import torch

from .resuming import ADAM, PLATEAU, SEGMENTS, configured, read, train, two_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_folders(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "other",
    [
        *(["--best-checkpoint-metric", "ppl"], ["--maximize-best-checkpoint-metric"]),
        *(["--valid-subset", "other"], ["--max-valid-steps", 1]),
    ],
    ids=lambda value: value[0],
)
def test_values_of_other_validations_are_not_compared(other, data, tmp_path, caplog):
    """A perplexity is never below the least loss: no checkpoint would be the best one, and --patience would run out."""
    options = [*ADAM, "--save-interval-updates", 2, "--validate-interval-updates", 2, "--patience", 3]
    for name in ("valid.idx", "valid.bin"):
        shutil.copy(data / "1" / name, data / "1" / name.replace("valid", "other"))
    train(configured(data / "1", *options, "--lr", 0.05, "--max-update", 10, "--valid-subset", "valid"), tmp_path)
    state = read(tmp_path)
    state["extra_state"]["best"] = state["extra_state"]["SegmentLanguageModelingTask"]["patience"]["best"] = 0.5
    state["extra_state"]["SegmentLanguageModelingTask"]["patience"]["num_runs"] = 2
    torch.save(state, tmp_path / "checkpoint_last.pt")
    train(configured(data / "1", *options, "--max-update", 14, "--valid-subset", "valid", *other), tmp_path)
    assert read(tmp_path)["optimizer_history"][-1]["num_updates"] == 14
    assert read(tmp_path)["extra_state"]["best"] > 0.5
    assert f"{other[0]} is " in caplog.text and "the next validation is the best one so far" in caplog.text


def test_values_of_another_text_are_not_compared(data, tmp_path, caplog):
    """The folder may have gone on to other data, or been made again. Its place alone tells nothing."""
    options = [*ADAM, "--validate-interval-updates", 4, "--max-update"]
    train(configured(data / "1", *options, 8), tmp_path)
    state, path = read(tmp_path), tmp_path / "checkpoint_last.pt"
    state["extra_state"]["best"] = 0.5
    torch.save(state, path)
    moved = shutil.copytree(data / "1", tmp_path / "moved")
    train(configured(moved, *options, 9), tmp_path)
    assert read(tmp_path)["extra_state"]["best"] == 0.5 and "the text of the split 'valid'" not in caplog.text
    for end in ("idx", "bin"):
        shutil.copy(data / "2" / f"valid.{end}", moved)
    train(configured(moved, *options, 12), tmp_path)
    assert read(tmp_path)["extra_state"]["best"] > 0.5
    told = r"the text of the split 'valid' is (\w{8}), there it was (?!\1)\w{8}: the next validation is the best one so"
    assert len(re.findall(told, caplog.text)) == 1


def test_another_text_to_train_on_is_told(data, tmp_path, caplog):
    """Inside an epoch it is refused. Folders that are trained on in turn have other texts anyway."""
    options = [*ADAM, "--disable-validation", "--max-update"]
    train(configured(data / "1", *options, SEGMENTS), tmp_path)  # to the end of an epoch
    told = r"checkpoint_last.pt: the text of the split 'train' is (\w{8}), there it was (?!\1)\w{8}$"
    for update, folders, count in ((1, "1", 0), (2, "2", 1), (3, "12", 0)):
        path = shutil.copytree(tmp_path, tmp_path.parent / f"after{update}") if update < 3 else tmp_path
        cfg = configured(data / "1", *options, SEGMENTS + 1)
        cfg.task.data = os.pathsep.join(str(data / number) for number in folders)
        caplog.clear()
        train(cfg, path)
        assert sum(bool(re.search(told, text)) for text in caplog.messages) == count


def test_other_streams_of_validations_are_told(data, tmp_path, caplog):
    """Their loss is another: each token has seen another context."""
    options = [*ADAM, "--max-update"]
    train(configured(data / "1", *options, 2, "--batch-size-valid", 3), tmp_path)
    path = tmp_path / "checkpoint_last.pt"
    for update, given in ((3, []), (4, ["--batch-size-valid", 1])):
        caplog.clear()
        train(configured(data / "1", *options, update, *given), tmp_path)
        before, now = (3, 4) if update == 3 else (4, 1)
        told = [text for text in caplog.messages if "the checkpoint was trained with" in text]
        assert told == [f"{path}: --batch-size-valid is {now}, the checkpoint was trained with {before}"]
    train(configured(data / "1", *options, SEGMENTS), tmp_path / "other")  # to the end of an epoch
    caplog.clear()
    train(configured(data / "1", *options, SEGMENTS + 1, "--batch-size", 2), tmp_path / "other")
    assert "--batch-size is 2, the" in caplog.text and "--batch-size-valid is" not in caplog.text  # it follows


@pytest.mark.parametrize(
    "given, told",
    [
        (["--batch-size", 4], ["--batch-size times ranks is 4, the checkpoint was trained with 8"]),
        (["--batch-size", 8], []),
        (
            ["--batch-size", 8, "--batch-size-valid", 4],
            ["--batch-size-valid times ranks is 4, the checkpoint was trained with 8"],
        ),
    ],
    ids=str,
)
def test_streams_are_counted_over_all_ranks(given, told, data, tmp_path, caplog):
    train(configured(data / "1", *ADAM, "--max-update", SEGMENTS), tmp_path)  # to the end of an epoch
    state, path = read(tmp_path), tmp_path / "checkpoint_last.pt"
    state["cfg"]["distributed_training"]["distributed_world_size"] = 2
    torch.save(state, path)
    caplog.clear()
    train(configured(data / "1", *ADAM, "--max-update", SEGMENTS + 1, *given), tmp_path)
    assert [text for text in caplog.messages if "was trained with" in text] == [f"{path}: {text}" for text in told]


def test_a_rate_that_goes_by_other_validations_begins_anew(data, tmp_path):
    options = [*ADAM, *PLATEAU, "--max-update"]
    train(configured(data / "1", *options, 2), tmp_path)
    other = configured(data / "1", *options, 3, "--best-checkpoint-metric", "ppl")
    with pytest.raises(ValueError, match=r"metric is ppl, .* with loss, and .* goes by it\. .* --reset-lr-scheduler"):
        train(other, tmp_path)
    other.checkpoint.reset_lr_scheduler = True
    train(other, tmp_path)
