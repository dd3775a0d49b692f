"""lm-evaluation-harness with this package's models.

python -m lamemo_fairseq.lm_eval --model_args pretrained=FOLDER --tasks wikitext,lambada_openai --batch_size 16

All options are those of `lm-eval`; the model is `lamemo` unless another one is named.
"""

import os
import sys


def main() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("lm_eval: one process evaluates: start it without torchrun, and pass --batch_size for a full GPU")
    try:
        from . import model  # noqa: F401  # registers it
    except ImportError as error:
        sys.exit(f"lm_eval: {error}")
    from lm_eval.__main__ import cli_evaluate

    arguments = sys.argv[1:]
    if (
        arguments
        and arguments[0] not in ("ls", "validate")
        and not {"-M", "--model"} & {a.split("=")[0] for a in arguments}
    ):
        sys.argv += ["--model", "lamemo"]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"lm_eval: {error}")


if __name__ == "__main__":
    main()
