"""The names of options that fairseq's commands have: an option of a memory of the same name would not be asked for."""

from argparse import ArgumentParser
from dataclasses import fields, is_dataclass
from typing import Set

from fairseq.dataclass.configs import FairseqConfig
from fairseq.registry import REGISTRIES

_OTHERS = ("arch", "data", "help", "model", "task", "criterion")


def names_of_options() -> Set[str]:
    """Return the names of all options but those of models and tasks, as they stand in a namespace."""
    names = {*_OTHERS, *REGISTRIES}
    for section in fields(FairseqConfig):
        if is_dataclass(section.type):
            names |= {f.name for f in fields(section.type)}
    for registry in REGISTRIES.values():
        known = registry["dataclass_registry"]
        names |= {f.name for dataclass in known.values() for f in fields(dataclass)}
        for name in set(registry["registry"]) - set(known):
            names |= _of_parser(registry["registry"][name])
    return names


def _of_parser(choice: type) -> Set[str]:
    """Return the options of a class that has no dataclass for them."""
    parser = ArgumentParser(add_help=False, conflict_handler="resolve")
    add = getattr(choice, "add_args", None)
    if add is not None:
        add(parser)
    return {action.dest for action in parser._actions}
