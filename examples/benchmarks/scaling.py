"""Repeat a training on 1, 2, 4, ... GPUs of one host, with as many streams on each: tokens/s, efficiency, peak memory.

    python examples/benchmarks/scaling.py enwik8 wt103-adaptive --worlds 1 2 --result scaling.json
    python examples/benchmarks/scaling.py quickstart --paths lamemo-eager --device cpu --steps 10   # ranks on a CPU

Efficiency is the rate divided by the number of GPUs times one GPU's rate in the same run; without one GPU there is
none. fairseq's `legacy_ddp` reduces gradients after the backward pass, `pytorch_ddp` in buckets while it runs; with
`--cuda-graphs` either does so while the graph runs. After the timed updates a few are profiled on the first rank, which
makes them a little longer (`timeline.py`). The profile tells for how much of a step the host does not wait for the
device, and for how long collectives run. It also tells for how long nothing runs beside collectives, and for how long
the device is idle.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from training import (
    OVERFLOWS,
    PATHS,
    PROFILED,
    ROOT,
    SIZES,
    TRAINING,
    gpus,
    model_options,
    peak_gib,
    segment_length,
    speeds,
    write_data,
)

from examples.tables.arguments import ArgumentParser, one_of

HERE = Path(__file__).resolve().parent
PROFILE = ("MB reduced", "host ms", "reduction ms", "exposed ms", "idle ms")
COLUMNS = ("size", "path", "gradients", "GPUs", "tok/s", "efficiency", "peak GiB of a GPU", *PROFILE)


def train(size: str, path: str, world: int, backend: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Run fairseq-train on *world* ranks; return words per second of all ranks, the largest peak, and the `PROFILE`."""
    result, interval = Path(folder) / "rank", max(1, args.steps // 8)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += [str(HERE / "timeline.py"), str(result), str(args.steps), str(PROFILED)]
    command += [folder, "--user-dir", str(ROOT / "lamemo_fairseq"), *TRAINING.split()]
    command += ["--max-update", str(args.steps + PROFILED), "--log-interval", str(interval)]
    command += [*model_options(size, path), "--ddp-backend", backend]
    command += ["--cpu"] if args.device == "cpu" else ["--fp16", "--distributed-world-size", str(world)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    environment = {**os.environ, **hidden, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command += args.options.split()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{log[-3000:]}")
    rates = speeds(done.stdout)[: args.steps // interval]  # before the profile
    ranks = [json.loads(path.read_text()) for path in (Path(f"{result}{rank}") for rank in range(world))]
    measured: dict[str, Any] = {"tok/s": statistics.median(rates[len(rates) // 2 :]), **ranks[0], "ranks": ranks}
    capacity = re.findall(r"total memory = ([\d.]+) GB", log)
    if capacity:
        measured["peak GiB"] = peak_gib(log, float(capacity[0]))
    return measured


def main() -> None:
    parser = ArgumentParser(description="tokens/s against the number of GPUs")
    parser.add_argument("sizes", nargs="*", type=one_of(SIZES), default=["enwik8"], help=", ".join(SIZES))
    parser.add_argument(
        "--paths", nargs="*", type=one_of(PATHS), default=["lamemo-graphs", "txl-graphs"], help=", ".join(PATHS)
    )
    parser.add_argument("--worlds", nargs="*", type=int, default=[1, 2], help="numbers of GPUs, 1 first")
    parser.add_argument("--backends", nargs="*", default=["pytorch_ddp", "legacy_ddp"])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--result", type=Path, help="a JSON file to write")
    parser.add_argument("--options", default="", help="more options of fairseq-train")
    args = parser.parse_args()
    device = ", ".join(gpus()) if args.device == "cuda" else "CPU"
    print(device)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    entries = []
    for size in args.sizes:
        _, words, streams, _ = SIZES[size]
        segments = args.steps + PROFILED + 2 + (OVERFLOWS if args.device == "cuda" else 0)
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), words, max(args.worlds) * streams * segment_length(size) * segments)
            for path in args.paths:
                alone = 0.0  # the rate of one GPU, if that is among the worlds
                for world in args.worlds:
                    for backend in args.backends if world > 1 else args.backends[:1]:
                        measured = train(size, path, world, backend, args, folder)
                        if world == 1:
                            alone = measured["tok/s"]
                        if alone:
                            measured["efficiency"] = measured["tok/s"] / world / alone
                        entries.append({"size": size, "path": path, "backend": backend, "GPUs": world, **measured})
                        efficiency = f"{measured['efficiency']:.1%}" if "efficiency" in measured else ""
                        peak = f"{measured['peak GiB']:.1f}" if "peak GiB" in measured else ""
                        names = f"{size} | {path} | {backend if world > 1 else ''} | {world}"
                        profile = " | ".join(f"{measured[n]:.1f}" if n in measured else "" for n in PROFILE)
                        rate = f"{measured['tok/s']:,.0f}"
                        print(f"| {names} | {rate} | {efficiency} | {peak} | {profile} |", flush=True)
    if args.result:
        args.result.write_text(
            json.dumps({"device": device, "command": sys.argv[1:], "rows": entries}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
