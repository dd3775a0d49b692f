"""Options that fairseq evaluates as Python are refused in one line that names them."""

import pytest

from lamemo_fairseq.host import option_checks
from lamemo_fairseq.host.option_rules import EVAL_LM, GENERATE, VALIDATE

from .command_lines import configuration, read, start_training

LISTS = "pass a number, or several separated by commas"
BETAS = r"pass two numbers from 0 to below 1, such as '\(0\.9, 0\.999\)'"
WRONG = {
    "--lr 5e-4x": f"--lr is '5e-4x': {LISTS}",
    "--lr 1e-3,": None,
    "--lr 1e-3,5e-4": None,
    "--lr []": f"--lr is empty: {LISTS}",
    "--update-freq (": rf"--update-freq is '\(': {LISTS}",
    "--update-freq 08": f"--update-freq is '08': {LISTS}",
    "--update-freq []": f"--update-freq is empty: {LISTS}",
    "--update-freq": "argument --update-freq: expected one argument",
    "--adam-betas 0.9": f"--adam-betas is '0.9': {BETAS}",
    "--adam-betas (0.9,": rf"--adam-betas is '\(0.9,': {BETAS}",
    "--adam-betas (0.9,1.5)": f"--adam-betas is .*: {BETAS}",
    "--adam-betas (0.9,print)": f"--adam-betas is .*: {BETAS}",
    "--adam-betas [0.9,0.98]": None,
    "--optimizer adamax --lr 1 --adamax-betas x": f"--adamax-betas is 'x': {BETAS}",
    "--optimizer lamb --lr 1 --lamb-betas 1": f"--lamb-betas is '1': {BETAS}",
    "--optimizer adafactor --lr 1e-3 --adafactor-eps 1e-30": "--adafactor-eps is '1e-30': pass two small numbers",
    "--lr-scheduler tri_stage --max-update 9 --phase-ratio (.1": rf"--phase-ratio is '\(.1': {LISTS}",
    "--lr-scheduler tri_stage --max-update 9 --phase-ratio .1,.2": "--phase-ratio is 0.1, 0.2: pass three numbers",
    "--lr-scheduler tri_stage --max-update 9 --phase-ratio .1,.2,.3": "0.3: pass three numbers that add up to 1",
    "--lr-scheduler tri_stage --max-update 9 --phase-ratio .1,.4,.5": None,
    "--lr-scheduler manual --update2lr {1:0.1}": "--update2lr is '{1:0.1}': pass rates by number or range in quotes",
    "--lr-scheduler manual --epoch2lr half": "--epoch2lr is 'half': pass rates",
    "--lr-scheduler manual --epoch2lr {'1-3':0.1,'4,5':1e-3}": None,
    "--optimizer-overrides {": "--optimizer-overrides is '{': pass a dictionary",
    "--batch-size-valid x": "--batch-size-valid is 'x': pass a whole number from 1",
    "--max-tokens-valid 0": "--max-tokens-valid is '0': pass a whole number from 1",
}


@pytest.mark.parametrize("line", WRONG)
def test_values_that_are_no_python_are_refused_by_name(line):
    words = line.split()
    optimizer = None if "--optimizer" in words else ("adam", None if "--lr" in words else 1e-3)
    if WRONG[line] is None:
        start_training(*words, optimizer=optimizer)
        return
    with pytest.raises(ValueError, match=WRONG[line]) as raised:
        start_training(*words, optimizer=optimizer)
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.__suppress_context__ or raised.value.__context__ is None  # one traceback


@pytest.mark.parametrize("command", [EVAL_LM, VALIDATE, GENERATE])
def test_evaluations_refuse_them_too(command):
    with pytest.raises(ValueError, match="--batch-size-valid is 'x': pass a whole number from 1"):
        read(command, "--batch-size-valid", "x")


def test_values_of_a_yaml_are_checked_too():
    for changes, message in (
        ({"optimizer__adam_betas": 0.9}, f"--adam-betas is 0.9: {BETAS}"),
        ({"optimizer__adam_betas": [0.9, 2]}, f"--adam-betas is 0.9, 2: {BETAS}"),
        ({"optimization__lr": []}, "--lr is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            option_checks.check_config(configuration("data", **changes))
    option_checks.check_config(configuration("data", optimizer__adam_betas=[0.9, 0.98]))
