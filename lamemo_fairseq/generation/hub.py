"""A trained model in a notebook."""

from typing import Any, Dict, List, Sequence, Union

import torch
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor

from ..data.text import clean_prompt


class LanguageModelHub(GeneratorHubInterface):
    """fairseq's hub interface: ``sample``, ``score``, ``generate``, ``encode``, ``decode``.

    Calls share nothing but the weights, so that several threads may make them. Each text is read from an empty memory.
    """

    def __init__(self, cfg: Any, task: Any, models: Sequence[Any]):
        try:
            super().__init__(cfg, task, models)
        except ImportError as error:
            if "fastBPE" not in str(error):
                raise
            # fairseq's advice fails: the C++ in the release was generated for Pythons before 3.11.
            raise ImportError(
                "bpe='fastbpe' needs the package fastBPE: "
                "pip install cython setuptools wheel && pip install --no-build-isolation fastBPE"
            ) from error

    def encode(self, sentence: str) -> Tensor:
        """Word ids of a text; the ends of its lines become end-of-sentence tokens, one at the very end included."""
        lines = [clean_prompt(line) for line in sentence.split("\n")]
        return torch.cat([super(LanguageModelHub, self).encode(line) for line in lines])

    def decode(self, tokens: Tensor) -> str:
        """The text of word ids, a line for each end-of-sentence token but the last."""
        eos = self.tgt_dict.eos()
        ids = tokens.tolist()
        lines: List[List[int]] = [[]]
        for i in ids[:-1] if ids and ids[-1] == eos else ids:
            lines.append([]) if i == eos else lines[-1].append(i)
        return "\n".join(super(LanguageModelHub, self).decode(torch.tensor(line)) for line in lines)

    def score(
        self, sentences: Union[str, Sequence[str]], replace_newline_with_eos: bool = True, **kwargs: Any
    ) -> Union[Dict[str, Tensor], List[Dict[str, Tensor]]]:
        """Natural log-probabilities of every token of texts of any length.

        Args:
            sentences: one text, or several.
            replace_newline_with_eos: as `encode` does; False joins the lines with spaces.

        Returns:
            For each text its ``tokens [T]``, their ``positional_scores [T]``, and their mean, ``score``.
        """
        if isinstance(sentences, str):
            return self.score([sentences], replace_newline_with_eos, **kwargs)[0]  # type: ignore[index, return-value]
        texts = list(sentences) if replace_newline_with_eos else [" ".join(s.split("\n")) for s in sentences]
        found = self.generate([self.encode(text) for text in texts], score_reference=True, **kwargs)
        return [hypotheses[0] for hypotheses in found]
