"""A model that was trained with an output layer of its own is not read as one without: half of the weights would go."""

import pytest
from fairseq_cli import eval_lm, train

from lamemo_fairseq.host.checkpoint_files import CheckpointError

from .helpers import TASK, run_command, write_data
from .test_commands import printed

SIZES = ["--arch", "transformer_xl_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-ffn-embed-dim", 8]
RUN = [*SIZES, "--decoder-attention-heads", 2, "--tokens-per-sample", 8, "--mem-len", 8, "--batch-size", 2]
RUN += ["--optimizer", "adam", "--lr", 0.01, "--num-workers", 0, "--disable-validation", "--store-ema"]


def test_an_untied_output_layer_stays_so(tmp_path):
    data, saved = write_data(tmp_path / "data", train=300, valid=60), tmp_path / "saved"
    folder = ["--save-dir", saved]
    run_command(train.cli_main, data, *TASK, *RUN, *folder, "--untie-output", "--max-update", 2)
    refused = r"other values for decoder\.output\.weights\.0 than for decoder\.embed_tokens\.tables\.0\.weight, .*untie"
    with pytest.raises(CheckpointError, match=refused):
        run_command(train.cli_main, data, *TASK, *RUN, *folder, "--max-update", 4)
    evaluate = [eval_lm.cli_main, data, *TASK, "--path", saved / "checkpoint_last.pt", "--gen-subset", "valid"]
    evaluate += ["--batch-size", 2, "--num-workers", 0]
    with pytest.raises(ValueError, match=refused):
        run_command(*evaluate, "--model-overrides", "{'untie_output': False}")
    assert "Loss (base 2)" in printed(*evaluate)
    run_command(train.cli_main, data, *TASK, *RUN, *folder, "--untie-output", "--max-update", 4)


def test_a_tied_output_layer_goes_on(tmp_path):
    """Also with averages, which have both names of the weight."""
    data = write_data(tmp_path / "data", train=300, valid=60)
    for updates in (2, 4):
        run_command(train.cli_main, data, *TASK, *RUN, "--save-dir", tmp_path / "saved", "--max-update", updates)
