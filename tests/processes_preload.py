"""What the processes of `processes.py` have imported before they are forked."""

import torch

torch.set_num_threads(1)

import fairseq_cli.train  # noqa: E402, F401

import lamemo_fairseq  # noqa: E402, F401
from tests import helpers, processes  # noqa: E402, F401
