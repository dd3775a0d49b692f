"""What the processes of `processes.py` have done before they are forked: half of what a short training takes."""

import torch

torch.set_num_threads(1)

import fairseq_cli.train  # noqa: E402, F401
import torch._dynamo  # noqa: E402
from fairseq import options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402

import lamemo_fairseq  # noqa: E402, F401
from tests import helpers, processes  # noqa: E402, F401

# The first optimizer imports torch._dynamo, and the first command line fills the caches of hydra's parser; those of the
# most frequent commands are composed but for values.
_ARGUMENTS = [
    "data",
    *map(str, helpers.TASK),
    "--batch-size",
    "1",
    "--optimizer",
    "adam",
    "--lr",
    "0.1",
    "--max-update",
    "2",
]
for arch in ("lamemo_lm", "transformer_xl_lm"):
    for schedule in ("fixed", "inverse_sqrt", "cosine"):
        chosen = [*_ARGUMENTS, "--arch", arch, "--lr-scheduler", schedule, "--warmup-updates", "1"]
        convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), chosen))
