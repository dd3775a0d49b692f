"""fairseq's generator, with prompts read into the memory before it begins.

Shapes: B prompts, L tokens of the longest, K beams, V words.
"""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq import search
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from ..core.decoding.state import DecodingState
from ..data.dictionary import NO_WORD
from ..host.ensembles import mean_over_models
from ..host.generation_options import check_length_penalty, refusal
from .progress import counter
from .repetition import aligned_right, repeating_words
from .sampling import is_plain_sampling, no_word_left, sampled_continuations
from .scorer import ReadTexts, read_texts


def read_prompts(model: Any, tokens: Tensor, lengths: Sequence[int], temperature: float = 1.0) -> ReadTexts:
    """Read ``tokens [B, L]`` of *lengths* up to each prompt's last token, and score all but the first."""
    return read_texts(model, tokens[:, :-1], tokens[:, 1:], [n - 1 for n in lengths], "prompt", temperature)


class Prompts(NamedTuple):
    """The texts read so far, which fairseq's generator carries along as an encoder's output, one text a beam."""

    states: List[DecodingState]  # by model
    words: Optional[Tensor]  # [B K, L], aligned on the right, where repeated n-grams are blocked


class PromptedEnsemble(EnsembleModel):
    """fairseq's ensemble, for the tokens after the prompts.

    The models' decoding states are passed as an encoder's output, which fairseq reorders with the beams.

    Args:
        models: the models.
        eos: the end-of-sentence token.
        no_repeat_ngram_size: n-grams of prompt and continuation that may not come again; 0 for none.
    """

    def __init__(self, models: Sequence[Any], eos: int, no_repeat_ngram_size: int):
        super().__init__(models)
        self.eos, self.no_repeat_ngram_size = eos, no_repeat_ngram_size
        self.bar: Any = None

    def forward_encoder(self, net_input: Dict[str, Any]) -> Prompts:
        return net_input["prompts"]

    def reorder_encoder_out(self, encoder_outs: Any, new_order: Tensor) -> Prompts:
        prompts: Prompts = encoder_outs
        for state in prompts.states:
            state.reorder(new_order)
        return prompts if prompts.words is None else prompts._replace(words=prompts.words[new_order])

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> tuple[Tensor, None]:
        """Return log-probabilities ``[B K, V]`` of the next word, in float32 or wider."""
        prompts: Prompts = encoder_outs
        logs = []
        for state in prompts.states:
            log_p = state.decoder.log_probs(state.read(tokens[:, -1:]))[:, 0]
            # Computed from log-probabilities rather than scores: an adaptive softmax has no scores of all words.
            logs.append(log_p if temperature == 1.0 else (log_p / temperature).log_softmax(-1))
        if self.bar is not None:
            self.bar.update(1)
        together = mean_over_models(logs)
        if prompts.words is not None:
            together = self._without_repetition(together, prompts.words, tokens[:, 1:])
        return together, None

    def _without_repetition(self, log_probs: Tensor, prompts: Tensor, new: Tensor) -> Tensor:
        """Forbid the words that would repeat an n-gram; a text may always end."""
        texts = torch.cat([prompts, new], dim=1)
        repeating = repeating_words(texts, self.no_repeat_ngram_size, log_probs.size(-1))
        repeating[:, self.eos] = False
        return log_probs.masked_fill(repeating, -math.inf)


class PromptGenerator(SequenceGenerator):
    """Continues prompts of any lengths, with end-of-sentence tokens anywhere in them.

    A hypothesis is the prompt and its continuation, as fairseq's language models return it; scores include the
    prompt's. At most ``--max-len-a`` times the prompt's length plus ``--max-len-b`` new words are generated. The
    arguments are those of fairseq's `SequenceGenerator`, whose own loop searches; plain sampling takes a faster one
    (`sampling.py`). ``no_repeat_ngram_size`` counts the n-grams of prompt and continuation together. A function of
    allowed words sees the prompt's last word and the continuation.
    """

    max_len_a: float
    max_len_b: int

    def __init__(self, models: Sequence[Any], tgt_dict: Any, no_repeat_ngram_size: int = 0, **kwargs: Any):
        if kwargs.get("match_source_len"):
            raise ValueError(refusal("match_source_len"))
        if kwargs.get("lm_model") is not None:
            raise ValueError(refusal("lm_path"))
        super().__init__(PromptedEnsemble(models, tgt_dict.eos(), no_repeat_ngram_size), tgt_dict, **kwargs)
        self.no_repeat_ngram_size = no_repeat_ngram_size
        if isinstance(self.search, search.Sampling):
            self.beam_size = kwargs.get("beam_size", 1)  # samples may be alike, so there can be more than words
            self.search.sampling_topk = min(self.search.sampling_topk, self.vocab_size)
        elif self.beam_size < kwargs.get("beam_size", 1):
            raise ValueError(
                f"--beam {kwargs['beam_size']} is more than the {self.beam_size} words that may come next: pass fewer, "
                "or --sampling"
            )
        if isinstance(self.search, search.DiverseSiblingsSearch) and 2 * self.beam_size > self.vocab_size:
            raise ValueError(
                f"--diversity-rate ranks the best 2 x --beam {self.beam_size} words, of which there are "
                f"{self.vocab_size}: pass a smaller --beam"
            )
        self.search.step = self._guarded(self.search.step)  # type: ignore[method-assign]
        self.pad = tgt_dict.pad_index  # an id that is never generated

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[Any],
        sample: Dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> List[List[Dict[str, Tensor]]]:
        """Continue the batch's texts, or the words *prefix_tokens* ``[B, P]``: their first words, or other ones."""
        tokens = sample["net_input"]["src_tokens"]
        lengths: List[int] = sample["net_input"]["src_lengths"].tolist()
        if prefix_tokens is not None:
            tokens = torch.cat([tokens[:, :1], prefix_tokens], dim=1)
            lengths = [
                self._beginning(sequence, length) for sequence, length in zip(tokens.tolist(), lengths, strict=True)
            ]
        # The limit of new words depends on a prompt's length: texts with one limit go together.
        groups: Dict[int, List[int]] = {}
        for sequence, length in enumerate(lengths):
            groups.setdefault(int(self.max_len_a * (length - 1) + self.max_len_b), []).append(sequence)
        hypotheses: Dict[int, List[Dict[str, Tensor]]] = {}
        for limit, sequences in groups.items():
            hypotheses.update(
                zip(sequences, self._continue(tokens, lengths, sequences, limit, sample, kwargs), strict=True)
            )
        return [hypotheses[sequence] for sequence in range(len(lengths))]

    def _beginning(self, tokens: List[int], length: int) -> int:
        """Count the *tokens* of a prefix, which is a text of *length*, its beginning, or another text.

        Of a text that is shorter than the beginnings asked for, fairseq also takes the end among its targets.
        """
        if length >= len(tokens) or tokens[length] in (self.eos, NO_WORD):
            return min(length, len(tokens))
        return sum(token != NO_WORD for token in tokens)

    def _continue(
        self, tokens: Tensor, lengths: List[int], sequences: List[int], limit: int, sample: Dict[str, Any], kwargs: Any
    ) -> List[List[Dict[str, Tensor]]]:
        limit = min(limit, self.max_len - 1)
        if limit < self.min_len:
            raise ValueError(
                f"--max-len-a and --max-len-b allow {limit} new words, fewer than --min-len {self.min_len}: "
                "pass a larger --max-len-b"
            )
        if self.normalize_scores:
            check_length_penalty(self.len_penalty, max(lengths[sequence] for sequence in sequences) + limit)
        index = torch.tensor(sequences, device=tokens.device)
        lengths = [lengths[sequence] for sequence in sequences]
        prompts = tokens[index, : max(lengths)]
        last = prompts[torch.arange(len(sequences)), torch.tensor(lengths) - 1]
        read = [read_prompts(model, prompts, lengths, self.temperature) for model in self.model.models]
        if is_plain_sampling(self) and not kwargs:
            with counter(limit, "generated") as bar:
                hypotheses = sampled_continuations(self, read[0].state, last, limit, bar)
        else:
            words = aligned_right(prompts[:, 1:], [n - 1 for n in lengths]) if self.no_repeat_ngram_size else None
            ids = sample.get("id", torch.arange(len(tokens)))[index.cpu()].to(index)
            hypotheses = self._search(Prompts([r.state for r in read], words), ids, last, limit, kwargs)
        log_probs = mean_over_models([r.log_probs for r in read])
        return [self._with_prompt(prompts[i, 1:n], log_probs[i, : n - 1], hypotheses[i]) for i, n in enumerate(lengths)]

    def _search(
        self, prompts: Prompts, ids: Tensor, last: Tensor, limit: int, kwargs: Any
    ) -> List[List[Dict[str, Tensor]]]:
        """Search with fairseq's own generator after the last words ``last [B]`` of prompts ``ids [B]``."""
        inner: Dict[str, Any] = {
            "net_input": {"src_tokens": last.unsqueeze(1), "src_lengths": torch.ones_like(last), "prompts": prompts}
        }
        if isinstance(self.search, search.PrefixConstrainedBeamSearch):
            inner["id"] = ids  # for the function of allowed words; diverse beams take ids for indices in the batch
        # Each column is one text, and its limit has been computed above.
        factors, self.max_len_a, self.max_len_b = (self.max_len_a, self.max_len_b), 0, limit
        try:
            with counter(limit, "generated") as bar:
                self.model.bar = bar
                return super()._generate(inner, bos_token=last.repeat_interleave(self.beam_size), **kwargs)
        finally:
            self.model.bar = None
            self.max_len_a, self.max_len_b = factors

    def _guarded(self, search_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a search's `step`, so that no text goes on after its end, or without a word that may follow.

        Diverse beams and functions of allowed words would extend hypotheses that fairseq has handed out as ended.
        """

        def guarded(at: int, log_probs: Tensor, scores: Tensor, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.search, search.Sampling):  # words drawn after an end are left out
                if log_probs.isneginf().all(-1).any():
                    self._raise_stuck(at)
                return search_step(at, log_probs, scores, tokens, *args, **kwargs)
            ended = tokens[:, 1:].eq(self.eos).any(1).view(*log_probs.shape[:2], 1)
            candidates = search_step(at, log_probs.masked_fill(ended, -math.inf), scores, tokens, *args, **kwargs)
            if candidates[0].isneginf().all(1).any():
                self._raise_stuck(at)
            return candidates

        return guarded

    def _raise_stuck(self, new_words: int) -> None:
        if self.no_repeat_ngram_size > 0:
            raise ValueError(
                f"after {new_words} new words every further one would repeat an n-gram: pass a larger "
                f"--no-repeat-ngram-size than {self.no_repeat_ngram_size}, or a smaller --min-len than {self.min_len}"
            )
        if isinstance(self.search, search.PrefixConstrainedBeamSearch):
            raise ValueError(
                f"prefix_allowed_tokens_fn leaves a text no word after {new_words} new ones: let it allow the end, "
                f"{self.eos}, or pass a smaller min_len than {self.min_len}"
            )
        raise no_word_left(new_words)

    def _with_prompt(
        self, prompt: Tensor, log_probs: Tensor, hypotheses: List[Dict[str, Tensor]]
    ) -> List[Dict[str, Tensor]]:
        for hypothesis in hypotheses:
            new = hypothesis["positional_scores"]
            hypothesis["tokens"] = torch.cat([prompt, hypothesis["tokens"]])
            hypothesis["positional_scores"] = torch.cat([log_probs.to(new), new])
            score = hypothesis["positional_scores"].sum()
            if self.normalize_scores:
                score = score / len(hypothesis["tokens"]) ** self.len_penalty
            hypothesis["score"] = score
        return sorted(hypotheses, key=lambda h: -float(h["score"]))
