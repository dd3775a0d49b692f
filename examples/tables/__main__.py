"""Train and evaluate the runs that a table still lacks, then render the table.

python -m examples.tables examples/enwik8/table.yaml                      every row, on the GPUs that there are
python -m examples.tables examples/enwik8/table.yaml --print lamemo       the commands of one row
python -m examples.tables examples/enwik8/table.yaml --print-slurm        jobs for SLURM instead
python -m examples.tables examples/enwik8/table.yaml --scale 60           all rows shrunk alike, to an hour
python -m examples.tables examples/enwik8/table.yaml --speed              what each row costs, alone
"""

import argparse
import math
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml

from . import commands, folder, kept, names, plots, process, recipes, render, scale, speed, table, units, validation
from .arguments import ArgumentParser
from .execute import Plan, RunError, Slot, check, check_kept, execute


def main(arguments: Optional[List[str]] = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(given)
    try:
        code = act(args)
        sys.stdout.flush()  # a pipe without a reader fails here, or at once
        return code
    except BrokenPipeError:  # as by `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        return 128 + signal.SIGPIPE
    except (table.TableError, folder.ChangedError, folder.BusyError, RunError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        process.stop()
        print("stopped; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130


def parser() -> ArgumentParser:
    argument_parser = ArgumentParser(
        prog=f"python -m {__package__}",
        description=(__doc__ or "").replace("python -m examples.tables", f"python -m {__package__}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    argument_parser.add_argument("table", type=Path, help="table file")
    argument_parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows only")
    argument_parser.add_argument("--seeds", nargs="+", type=int, help="these seeds instead of the table's")
    argument_parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of fairseq-train for every row (cpu=true)"
    )
    argument_parser.add_argument(
        "--out", type=Path, help="folder of the runs (default: work/tables/ and the table's folder)"
    )
    argument_parser.add_argument(
        "--results",
        type=Path,
        help="folder to keep results in and to render them; runs that it has are not run again (default: --out)",
    )
    argument_parser.add_argument("--scale", type=float, metavar="MINUTES", help="shrink every row alike to this budget")
    argument_parser.add_argument("--gpus", type=int, default=1, help="GPUs of one run, which share the table's streams")
    argument_parser.add_argument("--devices", help="GPUs to use, such as 0,1,2,3 (default: all)")
    argument_parser.add_argument("--jobs", type=int, default=1, help="runs side by side on a CPU (--set cpu=true)")
    argument_parser.add_argument(
        "--evaluations",
        type=int,
        default=1,
        metavar="K",
        help="evaluations of a run that go side by side on its device",
    )
    action = argument_parser.add_mutually_exclusive_group()
    action.add_argument("--print", metavar="ROW", help="print how to train a row and to test it, and run nothing")
    action.add_argument("--print-slurm", action="store_true", help="print jobs for what is missing and run nothing")
    action.add_argument(
        "--speed", nargs="?", type=int, const=160, metavar="UPDATES", help="train each row alone for a few updates"
    )
    action.add_argument("--render", action="store_true", help="render what is complete and run nothing")
    argument_parser.add_argument(
        "--as",
        dest="form",
        choices=recipes.FORMS,
        help="what --print prints: commands (the default), a shell script, or a YAML for fairseq-hydra-train",
    )
    argument_parser.add_argument(
        "--sbatch", metavar="OPTIONS", help='more options for --print-slurm, such as "--time 24:00:00"'
    )
    argument_parser.add_argument(
        "--environment",
        type=Path,
        metavar="PATH",
        help="virtual environment, or script, that jobs of --print-slurm activate (default: the active environment)",
    )
    return argument_parser


def act(args: argparse.Namespace) -> int:
    """Run the command line."""
    loaded = table.load(args.table)
    name = table_name(args.table)
    if args.print:
        trained = commands.training_options(loaded, args.print, options(args.set))
        validation.reads_as_trained(f"row '{args.print}'", trained, loaded.evaluation.options)
        print("\n\n".join(printed(loaded, args)))
        return 0
    if args.form:
        raise table.TableError(f"--as {args.form} says how --print prints: pass --print ROW too")
    for option in ("sbatch", "environment"):
        if getattr(args, option) is not None and not args.print_slurm:
            raise table.TableError(f"--{option} is for the jobs of --print-slurm: pass that too, or leave it out")
    ledger = args.results / "runs.jsonl" if args.results else None
    plan = Plan(
        loaded,
        args.out or default_out(name, args.scale),
        options(args.set),
        args.gpus,
        max(1, args.evaluations),
        results=args.results,
        kept=kept.read(ledger) if ledger else {},
    )
    check_kept(plan)
    runs = table.runs(loaded, args.only, args.seeds)
    if not plan.on_cpu:
        for row in dict.fromkeys(run.row for run in runs):
            commands.streams_a_device(loaded, row, plan.gpus)  # raises unless the GPUs can share the streams
    if args.scale is not None and not 0 < args.scale < math.inf:
        raise table.TableError(f"--scale is {args.scale}, it must be a positive number of minutes")
    if args.speed is not None and args.speed < 2:
        raise table.TableError(f"--speed is {args.speed}, it must be two updates at least: the first is left out")
    if args.speed is not None and args.scale is not None:
        raise table.TableError("--speed measures rows at their own number of updates: leave out --scale")
    for data in dict.fromkeys(map(plan.data, runs)):  # the page names the unit too
        units.check(loaded, data)
    if not args.render and args.speed is None:
        for row in dict.fromkeys(run.row for run in runs):
            trained = commands.training_options(loaded, row, plan.changes)
            validation.leaves_results(f"row '{row}'", trained)
            validation.reads_as_trained(f"row '{row}'", trained, loaded.evaluation.options)
        scale.check(plan, runs, args.scale)
    if not args.render:
        for row in dict.fromkeys(run.row for run in runs if not plan.complete(run)):
            trained = commands.training_options(loaded, row, plan.changes)
            names.known("fairseq-train", f"row '{row}'", trained, plan.changes)
            if args.speed is None:
                names.overridden(loaded, row, trained)
            evaluated = {**commands.shared_options(trained), **loaded.evaluation.options}
            names.known("fairseq-eval-lm", "evaluation.options", evaluated, {})
    if args.print_slurm:
        print("\n".join(jobs(plan, runs, args)))
        return 0
    if args.render:
        render.check(plan)
    folder.make(plan.rendered, "--results" if args.results else "--out")  # fails here, not after the runs
    if not args.render:
        folder.make(plan.out, "--out")
    if args.speed is not None:
        speed.measure_all(plan, list(dict.fromkeys(run.row for run in runs)), slots(args, plan.on_cpu), args.speed)
    places = [] if args.render or args.speed else slots(args, plan.on_cpu)
    if args.scale is not None:
        plan = scale.shrink(plan, runs, places, args.scale)
    failed = execute(plan, runs, places) if places else []
    # Other rows and seeds of the same folder may be there already, or be run by other jobs.
    seeds = sorted({*loaded.seeds, *(args.seeds or [])})
    everything = [*table.runs(loaded, None, seeds), *(run for run in plan.trained() if run.seed not in seeds)]
    if ledger:
        kept.add(ledger, filter(None, map(plan.result, everything)))
        plan = replace(plan, kept=kept.read(ledger))  # with the results that other jobs added
    text = render.write(plan, everything)
    try:
        plots.write(plan, everything)
    except table.TableError as error:
        print(f"no plots: {error}", file=sys.stderr)
    print(text)  # last: its reader may end earlier
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    return 1 if failed else 0


def printed(loaded: table.Table, args: argparse.Namespace) -> List[str]:
    """Return a row in the form that is asked for, once a seed.

    Raises:
        TableError: the form has room for one seed, but there are several.
    """
    runs = table.runs(loaded, [args.print], args.seeds or loaded.seeds[:1])
    form = args.form or recipes.FORMS[0]
    if form != recipes.FORMS[0] and len(runs) > 1:
        raise table.TableError(
            f"--as {form} describes one run: pass one of the --seeds {shlex.join(map(str, args.seeds))}"
        )
    path = args.table.resolve()
    shown = path.relative_to(folder.ROOT) if path.is_relative_to(folder.ROOT) else args.table
    words = ["python", "-m", str(__package__), str(shown), "--print", args.print, "--as", form]
    for option, values in (("--seeds", args.seeds), ("--set", args.set)):
        words += [option, *map(str, values)] if values else []
    words += ["--gpus", str(args.gpus)] if args.gpus > 1 else []
    source = " ".join(shlex.join(words).split())  # in one line: it stands in a comment
    changes, name = options(args.set), table_name(args.table)
    return [recipes.printed(form, loaded, run, name, args.gpus, changes, source) for run in runs]


def table_name(path: Path) -> str:
    """Return the folder of a table below examples/, with dashes: ``novels-bytes``."""
    folders = path.resolve().parent.parts
    below = folders[folders.index("examples") + 1 :] if "examples" in folders else folders[-1:]
    return "-".join(below) if path.stem == "table" and below else path.stem


def default_out(name: str, minutes: Optional[float]) -> Path:
    return Path("work/tables") / (name if minutes is None else f"{name}-scale-{minutes:g}")


def options(given: List[str]) -> Dict[str, Any]:
    """Return ``["cpu=true", "lr=1e-3"]`` as a dictionary.

    Raises:
        TableError: an entry has no ``=``, no value that YAML can read, or sets an option that the table may not set.
    """
    chosen: Dict[str, Any] = {}
    for entry in given:
        key, separator, value = entry.partition("=")
        key = key.lstrip("-")
        if not separator or not key:
            raise table.TableError(f"--set {entry}: pass OPTION=VALUE, such as cpu=true or lr=0.001")
        if key in ("batch-size", "seed", "save-dir"):
            raise table.TableError(f"--set {key}: it follows from the table's streams, from --seeds and from --out")
        try:
            chosen[key] = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            raise table.TableError(f"--set {entry}: the value is no YAML; quote it twice, as in lr='\"...\"'") from None
    return chosen


def slots(args: argparse.Namespace, on_cpu: bool) -> List[Slot]:
    """Return the slots that runs can be run in, one at a time in each.

    Raises:
        TableError: there are fewer GPUs than one slot needs.
    """
    if on_cpu:
        return [Slot()] * max(1, args.jobs)
    devices = args.devices.split(",") if args.devices else visible()
    free = [Slot(tuple(devices[i : i + args.gpus])) for i in range(0, len(devices) - args.gpus + 1, args.gpus)]
    if not free:
        raise table.TableError(
            f"--gpus {args.gpus}: there are {len(devices)} GPUs to use. On a CPU, pass --set cpu=true fp16=false"
        )
    return free


def visible() -> List[str]:
    """Return the GPUs that this process may use."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def jobs(plan: Plan, runs: List[table.Run], args: argparse.Namespace) -> List[str]:
    """Return a line for SLURM for each missing run; a shrunk table is one job, as its rows depend on each other.

    The data may be absent here. Each job checks them where it runs.
    """
    shared = [str(args.table), "--out", str(plan.out), *(["--results", str(plan.results)] if plan.results else [])]
    if args.set:
        shared += ["--set", *args.set]
    if plan.evaluations_at_once > 1:
        shared += ["--evaluations", str(plan.evaluations_at_once)]
    log = plan.out / "slurm-%j.log"
    gpus = 0 if plan.on_cpu else plan.gpus
    name = table_name(args.table)
    environment = commands.activation(args.environment)
    if args.scale is not None:
        chosen = (["--only", *args.only] if args.only else []) + (
            ["--seeds", *map(str, args.seeds)] if args.seeds else []
        )
        side_by_side = ["--jobs", str(args.jobs)] if args.jobs > 1 else []
        whole = [*shared, *chosen, "--scale", f"{args.scale:g}", "--gpus", str(plan.gpus), *side_by_side]
        return [
            f"mkdir -p {shlex.quote(str(plan.out))}",
            commands.slurm(name, whole, gpus, log, args.sbatch, environment),
        ]
    for data in dict.fromkeys(plan.data(run) for run in runs):
        if not folder.has_dictionary(data):
            print(f"# {data} is not on this machine: jobs need it where they run, by this path", file=sys.stderr)
    missing = check(plan, runs, data_elsewhere=True)
    lines = [
        commands.slurm(
            f"{name}-{run.row}-{run.seed}",
            [*shared, "--only", run.row, "--seeds", str(run.seed), "--gpus", str(plan.gpus)],
            gpus,
            log,
            args.sbatch,
            environment,
        )
        for run in missing
    ]
    return [f"mkdir -p {shlex.quote(str(plan.out))}", *lines] if lines else ["# every run is complete: --render"]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # schedulers end a job by this signal
    sys.exit(main())
