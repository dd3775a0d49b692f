"""What the processes of `processes.py` have imported before they are forked."""

import torch

torch.set_num_threads(1)

import fairseq_cli.train  # noqa: E402, F401

# A process imports it with its first optimizer, which takes half the time of a short training.
import torch._dynamo  # noqa: E402

import lamemo_fairseq  # noqa: E402, F401
from tests import helpers, processes  # noqa: E402, F401
