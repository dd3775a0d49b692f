"""A trained model in a notebook."""

from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Union

import torch
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor

from ..data.storage import check_ids
from ..data.text import clean_prompt
from ..host.generation_options import NAMES, check_names
from .lines import encode_prompts

_OF_GENERATE = ("skip_invalid_size_inputs", "inference_step_args", "prefix_allowed_tokens_fn")

# Options of commands, with the arguments that do the same here.
_OF_COMMANDS = {
    "nbest": "pass beam; generate gives as many texts, and sample the best one",
    "prefix_size": "the text is the prompt: pass its beginning",
    "no_seed_provided": "call torch.manual_seed before it",
}


class LanguageModelHub(GeneratorHubInterface):
    """fairseq's hub interface: ``sample``, ``score``, ``generate``, ``encode``, ``decode``.

    Calls share nothing but the weights, so that several threads may make them. Each text is read from an empty memory.
    """

    def __init__(self, cfg: Any, task: Any, models: Sequence[Any]):
        try:
            # As the data folder records it, where the call names none. First: its errors name the arguments.
            tokenizer, bpe = task.build_tokenizer(cfg.tokenizer), task.build_bpe(cfg.bpe)
            super().__init__(cfg, task, models)
        except ImportError as error:
            if "fastBPE" not in str(error):
                raise
            # fairseq's advice fails: the C++ in the release was generated for Pythons before 3.11.
            raise ImportError(
                "bpe='fastbpe' needs the package fastBPE: "
                "pip install cython setuptools wheel && pip install --no-build-isolation fastBPE"
            ) from error
        self.tokenizer, self.bpe = tokenizer, bpe

    def encode(self, sentence: str) -> Tensor:
        """Return a text's word ids; ends of its lines become end-of-sentence tokens, one at the very end included."""
        (ids,) = encode_prompts(
            [sentence],
            lambda line: self.apply_bpe(self.tokenize(clean_prompt(line))),
            self.src_dict,
            self.task.coding,
            by_word=False,
        )
        return ids

    def decode(self, tokens: Tensor) -> str:
        """Return the text of word ids, a line for each end-of-sentence token but the last."""
        eos = self.tgt_dict.eos()
        ids = tokens.tolist()
        lines: List[List[int]] = [[]]
        for i in ids[:-1] if ids and ids[-1] == eos else ids:
            lines.append([]) if i == eos else lines[-1].append(i)
        end = self.task.coding.line_end
        return end.join(super(LanguageModelHub, self).decode(torch.tensor(line)) for line in lines)

    def sample(self, sentences: Union[str, Sequence[str]], beam: int = 1, verbose: bool = False, **kwargs: Any) -> Any:
        """Continue a text, or several texts, each with its best continuation.

        Args:
            sentences: one text, or several.
            beam: number of texts to search for or draw; the one with the best score is returned.
            verbose: log them all.
            kwargs: as for `generate`.
        """
        self._check("sample", kwargs)
        if kwargs.get("score_reference"):
            raise ValueError("sample does not know 'score_reference': call score")
        return super().sample(_checked(sentences), beam, verbose, **kwargs)

    def generate(
        self,
        tokenized_sentences: Union[Tensor, Sequence[Any]],
        beam: int = 5,
        verbose: bool = False,
        skip_invalid_size_inputs: bool = False,
        inference_step_args: Optional[Dict[str, Any]] = None,
        prefix_allowed_tokens_fn: Optional[Callable[[int, Tensor], List[int]]] = None,
        **kwargs: Any,
    ) -> Any:
        """Continue texts of word ids, as `encode` gives them.

        Args:
            tokenized_sentences: one text, or several.
            beam: continuations of each.
            verbose: log them.
            skip_invalid_size_inputs: without effect, no text is too long.
            inference_step_args: of fairseq's ``task.inference_step``.
            prefix_allowed_tokens_fn: returns the words that may come next, given the text's number, and its last word
                with the continuation.
            kwargs: options of fairseq-generate, such as ``sampling``, ``max_len_b``, ``no_repeat_ngram_size``.

        Returns:
            Hypotheses of each text, the best first: dictionaries with ``tokens``, ``score``, ``positional_scores``.

        Raises:
            ValueError: an option is not known or cannot have its effect, or the dictionary lacks a word id.
        """
        self._check("generate", kwargs)
        return self._generate(
            tokenized_sentences, beam, verbose, skip_invalid_size_inputs, inference_step_args, prefix_allowed_tokens_fn,
            **kwargs,
        )  # fmt: skip

    def _generate(self, texts: Union[Tensor, Sequence[Any]], *args: Any, **kwargs: Any) -> Any:
        one = torch.is_tensor(texts) and texts.dim() == 1
        tensors = [torch.as_tensor(text, dtype=torch.int64) for text in ([texts] if one else texts)]
        if not tensors:
            return []
        for number, text in enumerate(tensors):
            check_ids(text.cpu().numpy(), f"text {number}", len(self.src_dict))
        hypotheses = super().generate(tensors, *args, **kwargs)
        return hypotheses[0] if one else hypotheses

    def _check(self, method: str, options: Dict[str, Any]) -> None:
        for name, reason in _OF_COMMANDS.items():
            if name in options:
                raise ValueError(f"{method} does not know '{name}': {reason}")
        check_names(options, [*(name for name in NAMES if name not in _OF_COMMANDS), *_OF_GENERATE], method)

    def score(
        self, sentences: Union[str, Sequence[str]], replace_newline_with_eos: bool = True, **kwargs: Any
    ) -> Union[Dict[str, Tensor], List[Dict[str, Tensor]]]:
        """Return natural log-probabilities of every token of texts of any length.

        Args:
            sentences: one text, or several.
            replace_newline_with_eos: as `encode` does; False joins the lines with spaces.

        Returns:
            For each text its ``tokens [T]``, their ``positional_scores [T]``, and their mean, ``score``.
        """
        if isinstance(sentences, str):
            return self.score([sentences], replace_newline_with_eos, **kwargs)[0]  # type: ignore[index, return-value]
        check_names(kwargs, ["skip_invalid_size_inputs"], "score")
        sentences = _checked(sentences)
        texts = list(sentences) if replace_newline_with_eos else [" ".join(s.split("\n")) for s in sentences]
        hypotheses = self._generate([self.encode(text) for text in texts], score_reference=True)
        return [of_text[0] for of_text in hypotheses]


def _checked(sentences: Any) -> Any:
    """Return one text or several as they are.

    Raises:
        ValueError: there is something else than texts.
    """
    texts = [sentences] if isinstance(sentences, str) or not isinstance(sentences, Iterable) else list(sentences)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"a text is a string, not a {type(text).__name__}: pass one, or a list of them; generate takes word ids"
            )
    return sentences if isinstance(sentences, str) else texts
