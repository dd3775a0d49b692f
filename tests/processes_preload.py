"""What the processes of `processes.py` have done before they are forked: half of what a short training takes."""

import torch

torch.set_num_threads(1)

import fairseq_cli.train  # noqa: E402, F401
import torch._dynamo  # noqa: E402
from fairseq import options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402

import lamemo_fairseq  # noqa: E402, F401
from tests import helpers, processes  # noqa: E402, F401

# The first optimizer imports torch._dynamo, and the first command line fills the caches of hydra's parser.
_ARGUMENTS = ["data", *map(str, helpers.TASK), "--arch", "lamemo_lm", "--optimizer", "adam", "--lr", "0.1"]
convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), _ARGUMENTS))
