"""lm-evaluation-harness with this package's models.

python -m lamemo_fairseq.lm_eval --model_args pretrained=FOLDER --tasks wikitext,lambada_openai --batch_size 16

All options are those of `lm-eval`. The model is `lamemo`, on a GPU if there is one, unless an option or a --config says
otherwise.
"""

import logging
import os
import signal
import sys

import torch


def main() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("lm_eval: one process evaluates: start it without torchrun, and pass --batch_size for a full GPU")
    try:
        from . import model  # noqa: F401  # registers it
    except ImportError as error:
        sys.exit(f"lm_eval: {error}")
    from lm_eval.__main__ import cli_evaluate

    logging.getLogger().setLevel(logging.WARNING)  # an import of fairseq's turns on DEBUG for every logger

    arguments = sys.argv[1:]
    named = {argument.split("=")[0] for argument in arguments}
    # A configuration file names model and device.
    if arguments and arguments[0] not in ("ls", "validate") and not named & {"--config", "-C"}:
        if not named & {"--model", "-M"}:
            sys.argv += ["--model", "lamemo"]
        if "--device" not in named and not torch.cuda.is_available():
            sys.argv += ["--device", "cpu"]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"lm_eval: {error}")
    except KeyboardInterrupt:
        print("lm_eval: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
