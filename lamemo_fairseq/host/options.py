"""fairseq's command line."""

import importlib.util
import logging
import os
import sys
from argparse import Namespace
from typing import Any, Callable, Optional, Sequence

from fairseq import options

from ..refusals import explain_out_of_memory, print_in_one_line
from .checkpoint_files import is_our_model, is_our_task
from .command_line import CommandLine
from .generation_defaults import adapt_generation
from .interruption import end_in_one_line
from .named_checkpoints import check_checkpoints, take_task_from_checkpoint
from .option_rules import EVAL_LM, on_cpu
from .quiet import leave_out_warnings, log_in_fairseqs_format
from .ranks import launched_ranks
from .signals import pass_on_to_ranks
from .stand_in import stand_in

logger = logging.getLogger(__name__)


@stand_in(options, "parse_args_and_arch")
def parse_args_and_arch(
    original: Callable[..., Any], parser: Any, input_args: Optional[Sequence[str]] = None, *args: Any, **kwargs: Any
) -> Any:
    """Check the command line of our models, and correct fairseq's conclusions from it; read others as fairseq does."""
    print_in_one_line()
    take_task_from_checkpoint(parser, input_args)
    words = list(sys.argv[1:] if input_args is None else input_args)
    line = CommandLine(parser, words)
    if kwargs.get("suppress_defaults"):  # the line has been read already
        with line.unchecked():
            return original(parser, input_args, *args, **kwargs)
    with line.plain_errors():
        parsed = original(parser, input_args, *args, **kwargs)
    namespace: Namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    if is_our_task(getattr(namespace, "task", None)) or is_our_model(getattr(namespace, "arch", None)):
        adapt_generation(namespace, words)
        _correct(namespace, words)
        line.check(namespace)
        if hasattr(namespace, "max_update"):
            pass_on_to_ranks()
        end_in_one_line()
        explain_out_of_memory()
        leave_out_warnings()
        if line.command == EVAL_LM:
            log_in_fairseqs_format()
    check_checkpoints(namespace)
    return parsed


def _correct(namespace: Namespace, words: Sequence[str]) -> None:
    """Correct fairseq's conclusions from a command line and its environment."""
    # fairseq takes --bf16 for a TPU's, from the days before GPUs had it, and then looks for torch_xla.
    if getattr(namespace, "tpu", False) and "--tpu" not in words and importlib.util.find_spec("torch_xla") is None:
        namespace.tpu = False
    # On CPUs there is one process, not one for each GPU.
    if getattr(namespace, "cpu", False) and not any(w.startswith("--distributed-world-size") for w in words):
        namespace.distributed_world_size = 1
    # fairseq recognises torchrun's ranks on GPUs alone; on CPUs each rank would train by itself.
    if on_cpu(vars(namespace)) and launched_ranks() > 1 and getattr(namespace, "distributed_init_method", "") is None:
        namespace.distributed_init_method = "env://"
        namespace.distributed_world_size = launched_ranks()
        namespace.distributed_rank = int(os.environ["RANK"])
        namespace.distributed_no_spawn = True
        namespace.distributed_backend = "gloo"
        if getattr(namespace, "ddp_backend", "legacy_ddp") != "legacy_ddp":
            if namespace.distributed_rank == 0:
                logger.info("--ddp-backend legacy_ddp takes the place of %s, which needs GPUs", namespace.ddp_backend)
            namespace.ddp_backend = "legacy_ddp"
