"""Logs lack what no user can do anything about; those of other models lack nothing.

`test_launch.py` and `test_generation_commands.py` look at the whole logs of commands.
"""

import logging
import sys
import warnings

import pytest
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

from lamemo_fairseq.host.quiet import leave_out_warnings, log_in_fairseqs_format, without_records


@pytest.mark.parametrize("command", ["train", "validate", "eval_lm", "generate", "interactive"])
def test_a_configuration_is_logged_as_its_command_line(command, caplog, monkeypatch):
    """Only that of this package's task; whether a command has set one up plays no part."""
    monkeypatch.setattr(sys, "argv", ["/bin/fairseq-x", "data", "--lr", "100%", "a b"])
    caplog.set_level(logging.INFO)
    logger = logging.getLogger(f"fairseq_cli.{command}")
    monkeypatch.setattr(logger, "disabled", False)
    ours, theirs, none = (OmegaConf.structured(FairseqConfig) for _ in range(3))
    ours.task = {"_name": "segment_language_modeling"}
    theirs.task = {"_name": "language_modeling"}
    for message in (ours, theirs, none, "{'_name': text}"):
        logger.info(message)
    assert caplog.messages == ["fairseq-x data --lr 100% 'a b'", str(theirs), str(none), "{'_name': text}"]


def test_warnings_that_mean_something_stay():
    with warnings.catch_warnings(record=True) as told:
        warnings.resetwarnings()
        leave_out_warnings()
        warnings.warn_explicit("old", UserWarning, "compose.py", 1, module="hydra.compose")
        warnings.warn_explicit("\n'config' is validated against ConfigStore schema", UserWarning, "x", 1, module="sys")
        assert not told
        warnings.warn_explicit("`torch.cuda.amp.autocast(args...)` is deprecated", FutureWarning, "x", 1, module="mine")
        warnings.warn_explicit("'config' has no lr", UserWarning, "x", 1, module="hydraulics")
    assert len(told) == 2


@pytest.mark.parametrize("own", [False, True])
def test_a_handler_of_nobody_is_replaced_by_fairseqs(own, monkeypatch, capsys):
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mine %(message)s" if own else logging.BASIC_FORMAT))
    root.addHandler(handler)
    log_in_fairseqs_format()
    root.info("news")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "mine news\n") if own else out.endswith(" | INFO | root | news\n")


def test_a_logger_is_quiet_for_a_while(caplog):
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("fairseq.test_quiet")
    with pytest.raises(ValueError), without_records(logger.name):
        logger.info("advice")
        logger.warning("a warning")
        raise ValueError
    logger.info("news")
    assert caplog.messages == ["a warning", "news"]
