"""fairseq's dictionary, for texts that may hold each of its symbols."""

import copy
from typing import Any, Iterable, List, Optional

import torch
from fairseq.data import Dictionary, data_utils

# Pads texts shorter than others. fairseq uses a symbol's id for padding, and then drops the symbol from texts.
NO_WORD = -1


class TextDictionary(Dictionary):
    """A dictionary whose special symbols are words like any other.

    ``pad_index`` is still the id of ``<pad>``. The words are those of the model. When fairseq's commands print, they
    add words such as joined pieces, to number them for a score. Those words go into a copy, so that no prompt gets
    their ids.
    """

    _with_others: Optional[Dictionary] = None

    def pad(self) -> int:
        """Return `NO_WORD`, an id that no word has."""
        return NO_WORD

    def string(
        self,
        tensor: Any,
        bpe_symbol: Optional[str] = None,
        escape_unk: bool = False,
        extra_symbols_to_ignore: Optional[Iterable[int]] = None,
        unk_string: Optional[str] = None,
        include_eos: bool = False,
        separator: str = " ",
    ) -> str:
        """Return the words of ids, one sequence a line.

        fairseq drops ``<s>`` and ``</s>`` wherever they stand. Here a single ``</s>`` is dropped: the first symbol of a
        prompt, or the last one of a hypothesis or line. Hypotheses come with *extra_symbols_to_ignore*.
        """
        if torch.is_tensor(tensor) and tensor.dim() == 2:
            extra = None if extra_symbols_to_ignore is None else set(extra_symbols_to_ignore)
            lines = (self.string(t, bpe_symbol, escape_unk, extra, unk_string, include_eos, separator) for t in tensor)
            return "\n".join(lines)
        ids: List[int] = [int(i) for i in tensor]
        if not include_eos:
            if extra_symbols_to_ignore is None and ids[:1] == [self.eos()]:
                ids = ids[1:]
            elif ids[-1:] == [self.eos()]:
                ids = ids[:-1]
        ignored = set(extra_symbols_to_ignore or ()) - {self.eos()}
        unknown = self.unk_string(escape_unk) if unk_string is None else unk_string
        words = [unknown if i == self.unk() else self[i] for i in ids if i not in ignored]
        return data_utils.post_process(separator.join(words), bpe_symbol)

    def encode_line(self, line: str, *args: Any, add_if_not_exist: bool = True, **kwargs: Any) -> torch.Tensor:
        """Number the words of a line as fairseq does. New words get ids beyond the model's, without being added."""
        if not add_if_not_exist:
            return super().encode_line(line, *args, add_if_not_exist=False, **kwargs)
        if self._with_others is None:
            self._with_others = copy.deepcopy(self)
        return Dictionary.encode_line(self._with_others, line, *args, add_if_not_exist=True, **kwargs)
