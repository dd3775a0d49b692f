"""Hydra without work that has no effect: a command of fairseq comes to its configuration in half the time."""

import copy
from contextlib import suppress
from typing import Any


def quicken() -> None:
    """Spare what hydra does again for each command; another version of it is only as slow as it is."""
    with suppress(ImportError, AttributeError):
        from hydra.core.config_store import ConfigStore
        from hydra.core.override_parser.overrides_parser import OverridesParser

        # For each command the list of sources is copied, and with it all that is stored, of which a copy is loaded.
        ConfigStore.__deepcopy__ = lambda store, memo: store

        # Most of a command's 300 overrides are defaults, the same for all commands.
        parse, parsed = OverridesParser.parse_rule, {}  # type: Any, Dict[Tuple[str, str], Any]

        def parse_rule(parser: Any, text: str, rule: str) -> Any:
            if (text, rule) not in parsed:
                parsed[text, rule] = parse(parser, text, rule)
            return copy.deepcopy(parsed[text, rule])  # the caller writes into it

        OverridesParser.parse_rule = parse_rule
