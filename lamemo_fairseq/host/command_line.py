"""Check a command line before fairseq reads it: its command, the given options, and names that are not known."""

import contextlib
import re
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any, Dict, Iterator, NoReturn, Sequence, Set

from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

from ..core.names import not_known, option_name
from . import absent_options, option_checks
from .checkpoint_files import is_our_model, is_our_task
from .configuration import check_model
from .dataclass_defaults import defaults_of
from .evaluated_options import read_as_before, read_in_words
from .optimizer_rules import WITH_RATE
from .option_rules import EVAL_LM, GENERATE, INTERACTIVE, TRAIN, VALIDATE
from .own import TASK, not_fed

# Options that one command has and the commands before it do not.
_MARKS = {
    INTERACTIVE: "--buffer-size",
    GENERATE: "--beam",
    EVAL_LM: "--context-window",
    TRAIN: "--arch",
    VALIDATE: "--path",
}

_KINDS = {"int": "a whole number", "float": "a number", "<lambda>": "a number, or several separated by commas"}


def _field(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


class CommandLine:
    """The words of a command line, and the parser that is to read them."""

    _unchecked = False

    def __init__(self, parser: ArgumentParser, words: Sequence[str]):
        self.parser = parser
        self.words = list(words)
        self.command = next((c for c, mark in _MARKS.items() if mark in parser._option_string_actions), None)
        lenient = ArgumentParser(add_help=False, allow_abbrev=False)
        defaults = {"--task": None, "--arch": None, "--criterion": "", "--update-freq": "1"}
        for name, default in defaults.items():  # a missing value is left to the parser itself, which names the option
            names = [name, "-a"] if name == "--arch" else [name]
            lenient.add_argument(*names, default=default, const=default, nargs="?")
        self.named = lenient.parse_known_args(self.words)[0]
        self.task = self.named.task or parser.get_default("task")

    @property
    def ours(self) -> bool:
        """The command line is for a model of this package."""
        return self.command is not None and (self.task == TASK or self._is_our_architecture())

    def _is_our_architecture(self) -> bool:
        model = ARCH_MODEL_REGISTRY.get(self.named.arch)
        return model is not None and model.__module__.startswith(f"{__package__.split('.')[0]}.")

    @classmethod
    @contextlib.contextmanager
    def unchecked(cls) -> Iterator[None]:
        """Leave lines that are read in this context unchecked, since they have been checked before."""
        cls._unchecked = True
        try:
            yield
        finally:
            cls._unchecked = False

    @contextlib.contextmanager
    def plain_errors(self) -> Iterator[None]:
        """Report an unreadable command line in one line, without the usage of 250 options.

        Raises:
            ValueError: the line cannot be read; the message names the option and the remedy.
        """
        if self.command is None or self._unchecked:
            yield
            return
        self._check_names()
        if not self.ours:
            yield
            return
        self._check_what_fairseq_misreads()

        def error(message: str) -> NoReturn:
            raise ValueError(self.in_words(message)) from None

        self.parser.error = error  # type: ignore[method-assign]
        read_in_words(self.parser)
        try:
            yield
        finally:
            read_as_before(self.parser)
            del self.parser.error

    def check(self, namespace: Namespace) -> None:
        """Check the options that were read.

        Raises:
            ValueError: as `option_checks.check` does.
        """
        if self.command is None or self._unchecked or not self.ours:
            return
        if self.command == TRAIN and is_our_task(self.task):
            check_model(Namespace(arch=self.named.arch), self.task)  # fairseq cannot merge options into some others
        settings = dict(vars(namespace))
        for name, default in self._model_defaults().items():
            if settings.get(name) is None:
                settings[name] = default
        defaults = {action.dest: action.default for action in self.parser._actions}
        given = self._given()
        changed = {name for name in given if settings.get(name) != defaults.get(name)}
        default_rate = self.command == TRAIN and "lr" not in given and settings["lr_scheduler"] != "manual"
        if default_rate and settings["optimizer"] in WITH_RATE:
            raise ValueError(f"no --lr: pass one, such as 2.5e-4; fairseq's default of {defaults['lr']} is too large")
        option_checks.check_line(self.command, settings, given, changed)

    def _model_defaults(self) -> Dict[str, Any]:
        """Return the defaults of the architecture's options, which fairseq fills in after the checks."""
        if self.command != TRAIN or not is_our_model(self.named.arch):
            return {}
        dataclass = MODEL_DATACLASS_REGISTRY[ARCH_MODEL_NAME_REGISTRY[self.named.arch]]
        return {name: value for name, value in defaults_of(dataclass).items() if not str(value).startswith("${")}

    def _given(self) -> Set[str]:
        strings = {word.split("=", 1)[0] for word in self.words if word.startswith("-")}
        return {action.dest for action in self.parser._actions if strings.intersection(action.option_strings)}

    def _check_names(self) -> None:
        task, arch = self.named.task, self.named.arch
        architectures = {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}
        if task is not None and task not in TASK_REGISTRY:
            raise ValueError(not_known("--task ", task, TASK_REGISTRY))
        if self.command != TRAIN:
            return
        if arch is None:
            raise ValueError("no --arch: pass a model's name, such as --arch lamemo_lm or transformer_xl_lm")
        if arch not in architectures:
            raise ValueError(not_known("--arch ", arch, architectures))
        if self._is_our_architecture() and task is None:
            raise ValueError(f"no --task: --arch {arch} reads consecutive segments, pass --task {TASK}")
        if is_our_model(arch) and not is_our_task(task):
            raise not_fed(TASK_REGISTRY[task])

    def _check_what_fairseq_misreads(self) -> None:
        if self.command == TRAIN:
            option_checks.check_criterion_name(self.named.criterion)
        if not re.fullmatch(r"[\s\[\](),\d+-]+", self.named.update_freq):  # 1.5 would become 1
            raise ValueError(f"--update-freq is {self.named.update_freq}: pass whole numbers such as 4 or 4,2")
        precisions = [word for word in self.words if re.fullmatch("--(memory-efficient-)?(fp16|bf16)", word)]
        if len({word[-4:] for word in precisions}) > 1:  # fairseq's error would be about TPUs
            raise ValueError(f"{' and '.join(precisions)} exclude each other: pass one")

    def in_words(self, message: str) -> str:
        """Return an error of argparse with its remedy."""
        if match := re.match(r"unrecognized arguments: (.*)", message, flags=re.DOTALL):
            names = [word.split("=", 1)[0] for word in match[1].split() if word.startswith("-")]
            return self.unrecognized(*names) if names else f"{message}: an option's value is one word, put it in quotes"
        if match := re.match(r"argument (\S+): invalid choice: '?([^']*)'? \(", message):
            option = match[1].split("/")[0]
            return not_known(f"{option} ", match[2], self.parser._option_string_actions[option].choices or ())
        if match := re.match(r"argument (\S+): invalid (\S+) value: '(.*)'", message):
            if match[3] == "???":
                return f"{match[1]} is not given: pass it"
            return f"{match[1]} is '{match[3]}': pass {_KINDS.get(match[2], match[2])}"
        return message

    def unrecognized(self, name: str, *others: str) -> str:
        """Return the message on options that the parser lacks: on all that are absent by design, or the first."""
        field = _field(name)
        absent = [known for known in map(_field, (name, *others)) if known in absent_options.ABSENT]
        if absent:
            return absent_options.message(absent)
        owners = [
            f"{option_name(registry)} {choice}"
            for registry in ("criterion", "optimizer", "lr_scheduler", "bpe", "tokenizer")
            for choice, config in REGISTRIES[registry]["dataclass_registry"].items()
            if config is not None and field in {f.name for f in fields(config)}
            if registry != "criterion" or option_checks.serves(choice)
        ]
        if owners:
            return f"{name} belongs to {' or '.join(owners)}, which is not given"
        hyphenated = option_name(field)
        if name != hyphenated and hyphenated in self.parser._option_string_actions:  # --mem_len
            return f"option {name} is not known: did you mean {hyphenated}?"
        if field in {f.name for f in fields(MODEL_DATACLASS_REGISTRY["lamemo_lm"])}:
            if self.command == TRAIN:
                return f"{name} is not known to --arch {self.named.arch}: pass --arch lamemo_lm or another with memory"
            return f"{name} belongs to training: change a trained model with --model-overrides \"{{'{field}': VALUE}}\""
        return not_known("option ", name, self.parser._option_string_actions)
