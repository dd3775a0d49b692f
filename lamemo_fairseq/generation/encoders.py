"""Text to tokens between spaces and back, as the text of a data folder was encoded.

Coders are those of the core, or fairseq's if a command names them. `PromptCoding` chooses among them.
"""

import hashlib
import logging
import os
import re
from typing import Any, Callable, List, Optional

from omegaconf.errors import MissingMandatoryValue

from ..core.names import nearest_path, option_name
from ..core.text.coders import Bytes, Coder, piece_coder, word_coder
from ..core.text.encoding import TextEncoding
from ..data.text_encoding import PREPROCESS, read_text_encoding

logger = logging.getLogger(__name__)

END = "</s>"
# Options of fairseq's coders that name files.
_FILES = ("sentencepiece_model", "sentencepiece_model_path", "bpe_codes", "bpe_vocab", "bpe_merges")


def recorded_pieces(record: TextEncoding) -> Optional[Coder]:
    """Build the coder for the pieces of a recorded encoding, None for whole words.

    Raises:
        FileNotFoundError: the SentencePiece model is missing.
        ValueError: the model is not the one that the text was encoded with.
    """
    if record.pieces == "sentencepiece":
        path = str(record.model)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"the text was encoded with {path}, which is not there: put it back, or pass --bpe sentencepiece "
                "--sentencepiece-model FILE"
            )
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        if digest != record.model_sha256:
            raise ValueError(
                f"{path} is not the model that the text was encoded with: put that back, or make the data again "
                f"with {PREPROCESS}"
            )
    return piece_coder(record)


def _check_files(choice: str, given: Any) -> None:
    """Refuse files that are missing: fairseq's error does not name the option.

    Raises:
        FileNotFoundError: with the option.
        MissingMandatoryValue: an option is not given.
    """
    for field in _FILES:
        path = getattr(given, field, None)
        if path is not None and "://" not in path and not os.path.exists(path):
            raise FileNotFoundError(f"{choice}: {option_name(field)} {path}: there is no such file{nearest_path(path)}")


class PromptCoding:
    """The coders of prompts: the coders that the command names, or without names those that the data folder records.

    Args:
        folder: of the data.
        joined: whether pieces have been joined before they are decoded, by ``--post-process``.
    """

    def __init__(self, folder: str, joined: bool):
        self.folder, self.joined = folder, joined
        self.record = read_text_encoding(folder)
        self._named = {"tokenizer": "", "bpe": ""}
        self._coders: Any = {}

    def build_coder(self, option: str, given: Any, build: Callable[[Any], Any]) -> Any:
        """Return the coder for ``tokenizer`` or ``bpe``, which is None where there is nothing to do.

        fairseq asks for the tokenizer first.

        Args:
            given: the option's value, or the configuration of the choice.
            build: builds fairseq's coder from *given*.

        Raises:
            ValueError: the choice needs another option.
            FileNotFoundError: a file that an option names is missing.
        """
        name = (given if isinstance(given, str) else getattr(given, "_name", None)) or ""
        self._named[option] = name
        try:
            _check_files(f"--{option} {name}", given)
            self._coders[option] = Bytes() if name == "bytes" else build(given) if name else None
        except MissingMandatoryValue as error:
            missing = str(error.full_key).rsplit(".", 1)[-1]
            raise ValueError(f"--{option} {name} needs a file: pass {option_name(missing)}") from error
        if option == "bpe":
            self._follow_record()
        recorded = self.record is not None and not any(self._named.values())
        return _Coder(self, option) if name or recorded else None

    def coder(self, option: str) -> Any:
        return self._coders[option]

    @property
    def follows_record(self) -> bool:
        """Prompts are encoded as the folder records it of its text."""
        if self.record is None or not any(self._named.values()):
            return self.record is not None
        plain = {"", "space", "none"}
        made = {"tokenizer": self.record.tokenizer, "bpe": self.record.pieces}
        return all(name == made[o] or {name, made[o]} <= plain for o, name in self._named.items())

    @property
    def line_end(self) -> str:
        """What stands between two lines of a text."""
        return (self.record if self.record is not None and self.follows_record else TextEncoding()).line_end

    @property
    def unit(self) -> str:
        """What a token of a prompt is, in the plural."""
        named = TextEncoding(pieces=self._named["bpe"])
        return (self.record if self.record is not None and not any(self._named.values()) else named).unit

    def _follow_record(self) -> None:
        if self.record is not None and not any(self._named.values()):
            self._coders = {"tokenizer": word_coder(self.record), "bpe": recorded_pieces(self.record)}
        elif self.record is not None and not self.follows_record:
            told = " ".join(f"--{option} {name}" for option, name in self._named.items() if name)
            logger.warning(
                "the text in %s was made with --tokenizer %s --bpe %s, but prompts are read with %s alone: leave out "
                "--tokenizer and --bpe to read them alike",
                self.folder,
                self.record.tokenizer,
                self.record.pieces,
                told,
            )


class _Coder:
    """A tokenizer or the pieces of a `PromptCoding`; decodes the text between ends of lines."""

    def __init__(self, coding: PromptCoding, option: str):
        self._coding, self._option = coding, option

    def encode(self, text: str) -> str:
        coder = self._coding.coder(self._option)
        return text if coder is None else coder.encode(text)

    def decode(self, tokens: str) -> str:
        coder = self._coding.coder(self._option)
        if coder is None or (self._option == "bpe" and self._coding.joined):
            return tokens
        return f" {END} ".join(coder.decode(line) for line in split_lines(tokens))


def split_lines(text: str) -> List[str]:
    """Split a prompt at each ``</s>``, with a space on either side; each ``</s>`` stands for the end of a line."""
    return re.split(f" ?{END} ?", text)
