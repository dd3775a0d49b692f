"""Hydra without work that has no effect: a command of fairseq comes to its configuration in a quarter of the time."""

import copy
import functools
import inspect
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

_Composed = Tuple[List[str], Any]  # overrides, and the configuration that hydra makes of them


def quicken() -> None:
    """Spare what hydra does again for each command; another version of it is only as slow as it is."""
    with suppress(ImportError, AttributeError):
        from fairseq.dataclass import utils
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
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

        # Commands with the same options, of which a few have other values, differ in these alone.
        compose, store, apply = utils.compose, ConfigStore.store, ConfigLoaderImpl._apply_overrides_to_config
        composed: Dict[Tuple[str, ...], _Composed] = {}

        def store_anew(*args: Any, **kwargs: Any) -> None:
            composed.clear()
            store(*args, **kwargs)

        def compose_changes(name: str, overrides: List[str], strict: bool) -> Any:
            key = (name, str(strict), *map(_names, overrides))
            if key not in composed:
                composed[key] = overrides, compose(name, overrides=overrides, strict=strict)
            former, configuration = composed[key]
            configuration = copy.deepcopy(configuration)
            changes = [new for old, new in zip(former, overrides, strict=True) if new != old]
            apply(OverridesParser.create().parse_overrides(changes), configuration)
            return configuration

        ConfigStore.store, utils.compose = store_anew, functools.wraps(compose)(compose_changes)

        # To find the file that calls, hydra reads the source of every function on the stack.
        from hydra._internal import utils as internal

        internal.inspect = SimpleNamespace(**vars(inspect))
        internal.inspect.stack = functools.partial(inspect.stack, 0)

        # A copy of a value is made as a new value, which is checked, and of its metadata every attribute is copied.
        from omegaconf import nodes
        from omegaconf.base import Metadata

        Metadata.__deepcopy__ = _copy_of_metadata
        for node in (nodes.AnyNode, nodes.StringNode, nodes.IntegerNode, nodes.FloatNode, nodes.BooleanNode):
            node.__deepcopy__ = _copy_of_value


def _copy_of_metadata(metadata: Any, memo: Dict[int, Any]) -> Any:
    copied = object.__new__(type(metadata))
    copied.__dict__.update(metadata.__dict__)
    copied.flags = copy.copy(metadata.flags)
    copied.resolver_cache = copy.deepcopy(metadata.resolver_cache, memo)
    return copied


def _copy_of_value(node: Any, memo: Dict[int, Any]) -> Any:
    copied = object.__new__(type(node))
    copied.__dict__.update(node.__dict__)  # the value too, and the parent, which are not copied
    copied.__dict__["_metadata"] = copy.deepcopy(node.__dict__["_metadata"], memo)
    copied.__dict__["_flags_cache"] = None
    return copied


def _names(override: str) -> str:
    """What an override sets; all of it if it chooses a group, such as ``task=segment_language_modeling``."""
    name = override.split("=")[0]
    return name if "." in name else override
