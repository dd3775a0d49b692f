"""Render the results of a table as Markdown and CSV."""

import csv
import io
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set

from . import commands, scale, speed
from .execute import Plan
from .folder import code, differences
from .kept import Result, run_of
from .table import JOINING, MEASURES, Evaluation, Row, Run, Table, TableError, streams
from .validation import without_controls


def check(plan: Plan) -> None:
    """Refuse to render a folder without results.

    Raises:
        TableError: it has none.
    """
    if plan.trained() or speed.read(plan):
        return
    from lamemo_fairseq.core.names import nearest_path  # with fairseq, which takes seconds to import

    places = " or ".join(str(folder) for folder in (plan.results, plan.out) if folder)
    raise TableError(
        f"there are no results of this table in {places}{nearest_path(plan.rendered)}: run the table without --render, "
        "or name the folder that has them with --results or --out"
    )


def collect(plan: Plan, runs: Sequence[Run]) -> Dict[str, List[Result]]:
    """Return the results of the trained runs, by row; some may lack evaluations."""
    by_row: Dict[str, List[Result]] = {name: [] for name in plan.table.rows}
    for run in runs:
        result = plan.result(run)
        if result is not None:
            by_row[run.row].append(result)
    return by_row


def write(plan: Plan, runs: Sequence[Run]) -> str:
    """Write table.md, table.csv, evaluations.csv and curves.csv; return the Markdown."""
    results = collect(plan, runs)
    text = markdown(plan, runs, results)
    plan.rendered.mkdir(parents=True, exist_ok=True)
    _put(plan.rendered / "table.md", text)
    _csv(plan.rendered / "table.csv", summaries(plan, results))
    _csv(plan.rendered / "evaluations.csv", evaluation_lines(plan, results))
    _csv(plan.rendered / "curves.csv", curve_lines(plan, results))
    return text


def scales(plan: Plan, results: Dict[str, List[Result]]) -> List[Dict[str, Any]]:
    """Return the ways in which the table, or a run with results, was shrunk, each once."""
    distinct = [plan.scale] if plan.scale else []
    for result in (result for of_row in results.values() for result in of_row):
        if result["scale"] and result["scale"] not in distinct:
            distinct.append(result["scale"])
    return distinct


def values(plan: Plan, results: List[Result], evaluation: Evaluation, key: Optional[str] = None) -> List[float]:
    """Return a value of an evaluation in all runs of a row; without a *key*, the measure of the table."""
    key = key or MEASURES[plan.table.measure][0]
    evaluations = [r["evaluations"].get(evaluation.name) for r in results]
    return [e[key] for e in evaluations if e is not None and e.get(key) is not None]


def trained(results: List[Result], key: str) -> List[float]:
    """Return a value of training in all runs of a row."""
    return [r["training"][key] for r in results if r["training"].get(key) is not None]


def rates(plan: Plan, name: str, results: List[Result]) -> List[float]:
    """Return the tokens/s of a row: measured alone, if that was done for any row of the table, else in its runs."""
    alone = speed.read(plan)
    return _alone(alone, name, "tokens_per_second") if alone else trained(results, "tokens_per_second")


def memory(plan: Plan, name: str, results: List[Result]) -> List[float]:
    """Return the peak memory of training in GiB, measured where `rates` are: of the device, or of a CPU's process."""
    alone = speed.read(plan)
    keys = ("device_memory_gib", "host_memory_gib")
    peaks = [_alone(alone, name, key) if alone else trained(results, key) for key in keys]
    return peaks[0] or peaks[1]


def _alone(alone: Dict[str, Any], name: str, key: str) -> List[float]:
    figure = alone.get(name, {}).get(key)
    return [] if figure is None else [figure]


def summaries(plan: Plan, results: Dict[str, List[Result]]) -> List[Dict[str, Any]]:
    """Return one line a row: means and spreads over the seeds, and over how many each mean was taken."""
    lines, beside = [], beside_reported(plan, results)
    for name, row in plan.table.rows.items():
        line: Dict[str, Any] = {"row": name, "title": row.title, "seeds": len(results[name])}
        for subset in plan.table.evaluation.subsets:
            line.update(_spread(subset, values(plan, results[name], Evaluation(subset))))
            line[f"{subset} reported"] = getattr(row.paper, subset, None) if name in beside else None
        line["parameters"] = next(iter(trained(results[name], "parameters")), None)
        line.update(_spread("tokens/s", rates(plan, name, results[name])))
        line.update(_spread("memory GiB", memory(plan, name, results[name])))
        line.update(_spread("training s", trained(results[name], "seconds")))
        line["departures"] = "; ".join(dict.fromkeys(word for r in results[name] for word in departures(plan, r)))
        lines.append(line)
    return lines


def _spread(name: str, numbers: List[float]) -> Dict[str, Any]:
    return {
        name: mean(numbers) if numbers else None,
        f"{name} spread": deviation(numbers) if len(numbers) > 1 else None,
        f"{name} seeds": len(numbers),
    }


def deviation(numbers: List[float]) -> float:
    """Return the standard deviation over seeds; NaN if a number is not finite."""
    return stdev(numbers) if all(map(math.isfinite, numbers)) else math.nan


def evaluation_lines(plan: Plan, results: Dict[str, List[Result]]) -> List[Dict[str, Any]]:
    """Return one line for each evaluation of a run."""
    lines = []
    for name, runs in results.items():
        for result in runs:
            for evaluation in plan.evaluations(run_of(result)):
                stored = result["evaluations"].get(evaluation.name)
                if stored is None:
                    continue
                line = {
                    "row": name,
                    "seed": result["run"]["seed"],
                    "subset": evaluation.subset,
                    "mem_len": evaluation.mem_len,
                    "tokens_per_sample": evaluation.tokens_per_sample,
                    "departures": "; ".join(departures(plan, result, [evaluation])),
                }
                measured = {key: value for key, value in stored.items() if key != "identity" and key not in line}
                lines.append({**line, **measured})
    return lines


def curve_lines(plan: Plan, results: Dict[str, List[Result]]) -> List[Dict[str, Any]]:
    """Return one line for each validation: the base-2 loss."""
    return [
        {"row": name, "seed": result["run"]["seed"], "update": update, "valid loss": loss, "departures": departed}
        for name, runs in results.items()
        for result in runs
        for departed in ["; ".join(departures(plan, result, []))]
        for update, loss in result["training"]["curve"]
    ]


def departures(plan: Plan, result: Result, evaluations: Optional[Sequence[Evaluation]] = None) -> List[str]:
    """Return where a run, or its *evaluations* (all if not given), departs from the table: for files without a page."""
    shrunk = [scale.departure(result["scale"])] if result["scale"] else []
    other = [e.name for e in stale(plan, result) if evaluations is None or e in evaluations]
    return [*plan.otherwise(result), *shrunk, *(f"{name} evaluated with other options" for name in other)]


def stale(plan: Plan, result: Result) -> List[Evaluation]:
    """Return the evaluations of a run that were made with other options than the table asks for."""
    run, done = run_of(result), result["evaluations"]
    here = replace(plan, shards=result["scale"]["shards"]) if result["scale"] else plan
    asked = [(e, here.evaluation_identity(run, e)) for e in plan.evaluations(run) if e.name in done]
    return [e for e, identity in asked if done[e.name].get("identity") != identity]


def _csv(path: Path, lines: List[Dict[str, Any]]) -> None:
    text = io.StringIO()
    if lines:
        cells = [{inert(key): inert(value) for key, value in line.items()} for line in lines]
        writer = csv.DictWriter(text, list(dict.fromkeys(key for line in cells for key in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)
    _put(path, text.getvalue())


def inert(value: Any) -> Any:
    """Return a text as a cell of a CSV, with an apostrophe in front if spreadsheets would compute it."""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@") else value


def escaped(text: str) -> str:
    """Return a text for a line or a cell of Markdown, with the marks of Markdown escaped."""
    text = re.sub(r"([\\`*\[\]<>|~&$#])|(?<!\w)_|_(?!\w)", r"\\\g<0>", without_controls(text).strip())
    return re.sub(r"^(\d*)(?=[-+=:.)])", r"\1\\", text)  # escaped where it would begin a list or a rule


def _put(path: Path, text: str) -> None:
    """Write a file that several jobs may write at once."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def markdown(plan: Plan, runs: Sequence[Run], results: Dict[str, List[Result]]) -> str:
    """Return the Markdown: the table, the lengths at test time, and where the runs were made."""
    table = plan.table
    digits = MEASURES[table.measure][2]
    splits = table.evaluation.subsets
    beside, alone = beside_reported(plan, results), speed.read(plan)
    measured = ["parameters", "tokens/s", "memory GiB", "training s"]
    papers = {name: reported(row, splits) if name in beside else "" for name, row in table.rows.items()}
    of_papers = ["reported " + " / ".join(splits)] if any(papers.values()) else []
    head = ["model", *splits, *of_papers, *measured, "seeds"]
    lines = []
    for name, row in table.rows.items():
        of_row = results[name]
        seeds = len(of_row)
        in_runs = 0 if alone else seeds
        lines.append(
            [
                escaped(row.title),
                *(shown(values(plan, of_row, Evaluation(subset)), digits, seeds) for subset in splits),
                *(papers[name] for _ in of_papers),
                shown(trained(of_row, "parameters")[:1], 0),
                shown(rates(plan, name, of_row), 0, in_runs),
                shown(memory(plan, name, of_row), 2, in_runs),
                shown(trained(of_row, "seconds"), 0, seeds),
                str(seeds),
            ]
        )
    sections = [
        f"# {escaped(table.title)}",
        f"{MEASURES[table.measure][1].capitalize()}{_unit(table)}; mean and standard deviation over the seeds.",
    ]
    sections += _shrunk(plan, results)
    sections += _otherwise(plan, results)
    left_out = [row.title for name, row in table.rows.items() if reported(row, splits) and name not in beside]
    if left_out:
        titles = escaped(", ".join(left_out))
        sections.append(f"Reported values are left out, as the runs are not those of the table: {titles}.")
    sections.append(_grid([head, *lines]))
    if alone:
        sections.append(
            f"Tokens/s and memory: each row alone for a few updates, on {escaped(speed.devices(alone))} (`speed.json`)."
        )
    for name, other in speed.otherwise(plan, alone).items():
        told = f"{name}'s tokens/s and memory are of other options or data than the table's: {'; '.join(other)}."
        sections.append(escaped(told))
    sections += _sweeps(plan, results, digits)
    sources = {table.rows[name].paper.source: None for name in beside if table.rows[name].paper.source}
    if sources:
        sections.append("Reported: " + "; ".join(map(escaped, sources)) + ".")
    lacking = [run.name for run in runs if not plan.complete(run)]
    if lacking:
        sections.append(f"Not complete: {', '.join(lacking)}.")
    if others := plan.elsewhere():
        names = escaped(", ".join(run.name for run in others))
        sections.append(f"Left out, as the table has no such rows: {names}.")
    for result in (result for of_row in results.values() for result in of_row):
        run = run_of(result)
        if departed := stale(plan, result):
            names = ", ".join(e.name for e in departed)
            sections.append(f"{run.name} was evaluated with other options than here: {names}.")
        wanted, done = result["run"]["options"].get("--max-update"), result["training"].get("updates")
        if isinstance(wanted, int) and isinstance(done, int) and done < wanted:  # stopped by time, patience or epochs
            sections.append(f"{run.name} ended after {done:,} of {wanted:,} updates.")
    sections += _other_streams(plan)
    sections += _other_data(results)
    sections += _where(results)
    return "\n\n".join(sections) + "\n"


def _unit(table: Table) -> str:
    """Return the unit of the measure, unless its name has it: fairseq's perplexity is that of a token."""
    per_token = table.measure == "perplexity" and not set(JOINING) & set(table.evaluation.options)
    return " per token of the data" if per_token else ""


def _sweeps(plan: Plan, results: Dict[str, List[Result]], digits: int) -> Iterable[str]:
    wanted = plan.table.evaluation
    for what, option, sweep in (
        ("Memory length", "mem_len", wanted.memory),
        ("Segment length", "tokens_per_sample", wanted.segments),
    ):
        rows = {name: row for name, row in plan.table.rows.items() if row.sweeps}
        if not sweep.lengths or not rows:
            continue
        at = [Evaluation(sweep.subset, **{option: length}) for length in sweep.lengths]
        lines, notes = [], ""
        for name, row in rows.items():
            complete = fullest(results[name], at)
            lines.append([escaped(row.title), *(shown(values(plan, complete, e), digits) for e in at)])
            if len(complete) < len(results[name]):
                notes += f"\n\n{escaped(row.title)}: {_seeds(complete)} only, as others lack lengths."
        grid = _grid([[f"{sweep.subset}, {what.lower()}", *map(str, sweep.lengths)], *lines])
        yield f"## {what} at test time\n\n{grid}{notes}"


def _seeds(results: List[Result]) -> str:
    return f"seed{'s' if len(results) > 1 else ''} {', '.join(str(result['run']['seed']) for result in results)}"


def fullest(results: List[Result], evaluations: Sequence[Evaluation]) -> List[Result]:
    """Return the seeds that have most of the evaluations, the same ones, so that means over them are comparable."""
    names = [frozenset(e.name for e in evaluations if e.name in result["evaluations"]) for result in results]
    most = max(names, key=lambda of: (len(of), names.count(of)), default=frozenset())
    return [result for result, of in zip(results, names, strict=True) if of == most]


def shown(numbers: List[float], digits: int, seeds: int = 0) -> str:
    """Return a mean with its spread, as a cell; it says of how many seeds they are if these are not all *seeds*."""
    if not numbers:
        return ""
    cell = f"{mean(numbers):,.{digits}f}"
    if len(numbers) > 1:
        cell += f" ± {deviation(numbers):,.{digits}f}"
    return f"{cell} ({len(numbers)} seed{'s' * (len(numbers) > 1)})" if len(numbers) < seeds else cell


def reported(row: Row, splits: Sequence[str]) -> str:
    """Return the results that a row's paper reports."""
    cells = [getattr(row.paper, split, None) for split in splits]
    return " / ".join("-" if c is None else f"{c:g}" for c in cells) if any(c is not None for c in cells) else ""


def beside_reported(plan: Plan, results: Dict[str, List[Result]]) -> List[str]:
    """Return the rows whose reported values may stand beside their results, or beside all if they have none."""
    apart = {name: any(r["scale"] or plan.otherwise(r) for r in of_row) for name, of_row in results.items()}
    return [name for name in plan.table.rows if not (apart[name] if results[name] else any(apart.values()))]


def _shrunk(plan: Plan, results: Dict[str, List[Result]]) -> Iterable[str]:
    """Tell how runs were shrunk, and which, unless all were shrunk alike."""
    everything = [result for of_row in results.values() for result in of_row]
    for one in scales(plan, results):
        names = [run_of(result).name for result in everything if result["scale"] == one]
        only = f" Only these runs were shrunk so: {', '.join(names) or 'none'}."
        yield scale.note(one) + (only if len(names) < len(everything) else "")


def _otherwise(plan: Plan, results: Dict[str, List[Result]]) -> Iterable[str]:
    """Tell which runs depart from the table, as --set makes them or a table that was edited."""
    everything = [result for of_row in results.values() for result in of_row]
    named: Dict[str, List[str]] = {}
    for result in everything:
        if other := plan.otherwise(result):
            named.setdefault("; ".join(other), []).append(run_of(result).name)
    for words, names in named.items():
        who = "all runs" if 1 < len(names) == len(everything) else ", ".join(names)
        yield escaped(f"Other options or data than the table's, in {who}: {words}.")


def _other_streams(plan: Plan) -> Iterable[str]:
    """Tell where rows are read in unlike numbers of streams: each begins with an empty memory, which costs loss."""
    table, wanted = plan.table, plan.table.evaluation
    trained = {row: commands.training_options(table, row, plan.changes) for row in table.rows}
    lengths = {str(options.get("tokens-per-sample")) for options in trained.values()} | {
        *map(str, wanted.segments.lengths)
    }
    alone = wanted.options.get("documents") not in (None, "none") and wanted.options.get("at-document") != "keep"
    if len(lengths) > 1 and "batch-size" not in wanted.options and not alone:
        yield "Models with longer segments were read in fewer streams: write `batch-size` into evaluation.options."
    validated = {options.get("batch-size-valid") or streams(table, row) for row, options in trained.items()}
    if len(validated) > 1:
        yield "Curves are of validations in unlike numbers of streams: write `batch-size-valid` into options."


def _other_data(results: Dict[str, List[Result]]) -> Iterable[str]:
    """Tell which runs read other data than most: the splits of a path may have been made anew."""
    everything = [result for of_row in results.values() for result in of_row]
    data = [json.dumps(result["run"].get("data"), sort_keys=True) for result in everything]
    most = max(data, key=data.count, default="null")
    for result, of_run in zip(everything, data, strict=True):
        if of_run != most:
            other = "; ".join(differences(json.loads(of_run), json.loads(most)))
            yield f"{run_of(result).name} was run on other data than most runs: {escaped(other)}."


def _where(results: Dict[str, List[Result]]) -> Iterable[str]:
    """Tell where and with which code runs were made, and which runs if not all alike."""
    for what, of in (
        ("device", lambda s: s["device"]),
        ("versions", lambda s: ", ".join(f"{k} {v}" for k, v in s["versions"].items())),
        ("commit", code),
    ):
        made = {run_of(r).name: {of(start) for start in r["starts"]} for of_row in results.values() for r in of_row}
        kinds = sorted(set().union(*made.values()))
        if len(kinds) == 1:
            yield f"{what.capitalize()}: {escaped(*kinds)}."
        elif kinds:
            several = "; ".join(f"{escaped(one)} ({_named(results, made, one)})" for one in kinds)
            yield f"{what.capitalize()} (several: compare tokens/s and memory within one only): {several}."


def _named(results: Dict[str, List[Result]], made: Dict[str, Set[str]], one: str) -> str:
    """Return the names of the runs with *one* among what they were *made* with; rows, where it is all their runs."""
    names: List[str] = []
    for row, of_row in results.items():
        runs = [run_of(result).name for result in of_row]
        chosen = [name for name in runs if one in made[name]]
        names += [row] if chosen == runs != [] else chosen
    return ", ".join(names)


def _grid(lines: List[List[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)
