"""The tokenizer of transformers, around the core's."""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from transformers import PreTrainedTokenizer

from ..core.text import END, Tokenizer
from ..core.text.encoding import CODES, MODEL
from ..core.text.tokenizer import DICTIONARY, ENCODING, SPECIAL
from .configuration import CODE

PADDING = SPECIAL.index("<pad>")


class LamemoTokenizer(PreTrainedTokenizer):
    """Text to word ids as the model's data was encoded. A text begins with ``</s>``, which also ends its lines.

    Batches are padded on the left, and padding is not read. ``decode(skip_special_tokens=True)`` leaves out the first
    ``</s>``, those at the end, and padding; others are ends of lines.
    """

    vocab_files_names = {
        "vocab_file": DICTIONARY,
        "encoding_file": ENCODING,
        "sentencepiece_file": MODEL,
        "codes_file": CODES,
    }
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: Optional[str] = None,
        encoding_file: Optional[str] = None,
        sentencepiece_file: Optional[str] = None,
        codes_file: Optional[str] = None,
        **kwargs: Any,
    ):
        if vocab_file is None:
            folder = kwargs.get("name_or_path", "the folder")
            raise ValueError(
                f"{folder} has no {DICTIONARY}: its model was saved without a tokenizer. Set model.tokenizer, save the "
                "model again, and export it again"
            )
        self.core = Tokenizer.load(os.path.dirname(vocab_file))
        _, pad, eos, unk = SPECIAL
        special = {"bos_token": eos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
        kwargs["auto_map"] = {"AutoTokenizer": [f"{CODE}.LamemoTokenizer", None]}
        super().__init__(**{**special, "split_special_tokens": True, "padding_side": "left", **kwargs})

    @classmethod
    def of(cls, core: Tokenizer, folder: Union[str, Path]) -> "LamemoTokenizer":
        """Write the files of a tokenizer of the core to a folder, and return the one around it."""
        core.save(folder)
        return cls(os.path.join(folder, DICTIONARY))

    @property
    def vocab_size(self) -> int:
        return len(self.core)

    def get_vocab(self) -> Dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.core.symbols)}

    def build_inputs_with_special_tokens(
        self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None
    ) -> List[int]:
        """Return one text, or two after each other, each after ``</s>``."""
        return [END, *token_ids_0] + ([] if token_ids_1 is None else [END, *token_ids_1])

    def save_vocabulary(self, save_directory: str, filename_prefix: Optional[str] = None) -> Tuple[str, ...]:
        if filename_prefix:
            raise ValueError("the files of a tokenizer have fixed names: leave filename_prefix out")
        self.core.save(save_directory)
        names = (os.path.join(save_directory, name) for name in self.vocab_files_names.values())
        return tuple(filter(os.path.isfile, names))

    @classmethod
    def register_for_auto_class(cls, auto_class: object = "AutoTokenizer") -> None:
        """Do nothing: the code in a saved folder imports this package, wherever the object comes from."""

    def _tokenize(self, text: str, **kwargs: Any) -> List[str]:
        return [self.core.symbols[number] for number in self.core.encode(text).tolist()]

    def _convert_token_to_id(self, token: str) -> int:
        return self.core.number(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.core.symbols[index]

    def convert_tokens_to_string(self, tokens: List[str]) -> str:
        return self.core.decode([self.core.number(token) for token in tokens])

    def _decode(self, token_ids: Union[int, List[int]], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        numbers = [token_ids] if isinstance(token_ids, int) else [int(number) for number in token_ids]
        if skip_special_tokens:
            numbers = [number for number in numbers if number != PADDING]
            while numbers and numbers[-1] == END:
                numbers.pop()
            numbers = numbers[1:] if numbers[:1] == [END] else numbers
        return self.core.decode(numbers)
