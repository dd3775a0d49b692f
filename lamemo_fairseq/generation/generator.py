"""fairseq's generator, with prompts read into the memory before it begins.

Shapes: B prompts, L tokens of the longest, K beams, V words.
"""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from ..models.incremental import DecodingState
from .progress import counter
from .sampling import is_plain_sampling, sampled_continuations
from .scorer import stream_log_probs


class ReadPrompts(NamedTuple):
    """Prompts that a model has read but for their last tokens."""

    state: DecodingState
    log_probs: Tensor  # [B, L - 1], of the prompts' tokens after the first


def read_prompts(model: Any, tokens: Tensor, lengths: Sequence[int]) -> ReadPrompts:
    """Read ``tokens [B, L]`` of *lengths*, segment by segment, up to each row's last token."""
    state = DecodingState(model.decoder, len(tokens))
    before = [n - 1 for n in lengths]
    parts = [torch.zeros(len(tokens), 0, device=tokens.device)]
    with counter(max(before), "prompt") as bar:
        for part in stream_log_probs(model, state, tokens[:, :-1], tokens[:, 1:], before):
            parts.append(part)
            bar.update(part.size(1))
    return ReadPrompts(state, torch.cat(parts, dim=1))


class PromptedEnsemble(EnsembleModel):
    """fairseq's ensemble; the generator's tokens are those after the prompts.

    What the prompts left behind takes the way of an encoder's output to the first step.
    """

    def __init__(self, models: Sequence[Any]):
        super().__init__(models)
        self.bar: Any = None

    def forward_encoder(self, net_input: Dict[str, Any]) -> List[DecodingState]:
        return net_input["states"]

    def reorder_encoder_out(self, encoder_outs: Any, new_order: Tensor) -> Any:
        for state in encoder_outs:
            state.reorder(new_order)
        return encoder_outs

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: Any, incremental_states: Any, temperature: float = 1.0
    ) -> tuple[Tensor, None]:
        """Log-probabilities ``[B K, V]`` of the next word, in float32 or wider."""
        if encoder_outs:  # the first step: from now on the incremental states have them, and are reordered
            for model, incremental, state in zip(self.models, incremental_states, encoder_outs, strict=True):
                model.decoder.set_decoding_state(incremental, state)
            encoder_outs.clear()
        logs = []
        for model, incremental in zip(self.models, incremental_states, strict=True):
            scores = model.decoder(tokens, incremental_state=incremental)
            log_p = model.get_normalized_probs((scores[0][:, -1:], None), True)[:, 0]
            # Of log-probabilities rather than scores: an adaptive softmax has no scores of all words.
            logs.append(log_p if temperature == 1.0 else (log_p / temperature).log_softmax(-1))
        if self.bar is not None:
            self.bar.update(1)
        together = logs[0] if len(logs) == 1 else torch.stack(logs).logsumexp(0) - math.log(len(logs))
        return together, None


class PromptGenerator(SequenceGenerator):
    """Continues prompts of any lengths, with end-of-sentence tokens anywhere in them.

    A hypothesis is the prompt and what follows, as fairseq gives it for language models; scores include the
    prompt's. ``--max-len-a`` times the prompt's length plus ``--max-len-b`` new words are generated at most.
    Takes the arguments of fairseq's `SequenceGenerator`, whose own loop searches; plain sampling takes a faster one
    (`sampling.py`). Blocks of repeated n-grams and a function of allowed words see the prompt's last word and what
    follows.
    """

    max_len_a: float
    max_len_b: int

    def __init__(self, models: Sequence[Any], tgt_dict: Any, **kwargs: Any):
        if kwargs.get("match_source_len"):
            raise ValueError("--match-source-len is for translation: pass --max-len-a and --max-len-b instead")
        if kwargs.get("lm_model") is not None:
            raise ValueError(
                "--lm-path adds a language model to a translation model: pass both to --path, separated by :"
            )
        super().__init__(PromptedEnsemble(models), tgt_dict, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[Any],
        sample: Dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> List[List[Dict[str, Tensor]]]:
        """Continue the batch's texts, or the first words of them or other ones, *prefix_tokens* ``[B, P]``."""
        tokens = sample["net_input"]["src_tokens"]
        lengths: List[int] = sample["net_input"]["src_lengths"].tolist()  # padding may be a word of a text
        if prefix_tokens is not None:
            tokens = torch.cat([tokens[:, :1], prefix_tokens], dim=1)
            lengths = [self._beginning(row, length) for row, length in zip(tokens.tolist(), lengths, strict=True)]
        # The limit of new words depends on a prompt's length: texts with one limit go together.
        groups: Dict[int, List[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(int(self.max_len_a * (length - 1) + self.max_len_b), []).append(row)
        found: Dict[int, List[Dict[str, Tensor]]] = {}
        for limit, rows in groups.items():
            found.update(zip(rows, self._continue(tokens, lengths, rows, limit, sample, kwargs), strict=True))
        return [found[row] for row in range(len(lengths))]

    def _beginning(self, tokens: List[int], length: int) -> int:
        """How many *tokens* are a text of *length* or a beginning of it, or a text of their own.

        Of a text that is shorter than the beginnings asked for, fairseq also takes the end among its targets.
        """
        if length >= len(tokens) or tokens[length] in (self.eos, self.pad):
            return min(length, len(tokens))
        return sum(token != self.pad for token in tokens)

    def _continue(
        self, tokens: Tensor, lengths: List[int], rows: List[int], limit: int, sample: Dict[str, Any], kwargs: Any
    ) -> List[List[Dict[str, Tensor]]]:
        limit = min(limit, self.max_len - 1)
        if limit < self.min_len:
            raise ValueError(
                f"--max-len-a and --max-len-b allow {limit} new words, fewer than --min-len {self.min_len}: "
                "pass a larger --max-len-b"
            )
        index = torch.tensor(rows, device=tokens.device)
        lengths = [lengths[row] for row in rows]
        prompts = tokens[index, : max(lengths)]
        last = prompts[torch.arange(len(rows)), torch.tensor(lengths) - 1]
        read = [read_prompts(model, prompts, lengths) for model in self.model.models]
        if is_plain_sampling(self) and not kwargs:
            with counter(limit, "generated") as bar:
                hypotheses = sampled_continuations(self, read[0].state, last, limit, bar)
        else:
            ids = sample["id"][index] if "id" in sample else index
            hypotheses = self._search([r.state for r in read], ids, last, limit, kwargs)
        log_probs = torch.stack([r.log_probs for r in read]).logsumexp(0) - math.log(len(read))
        return [self._with_prompt(prompts[i, 1:n], log_probs[i, : n - 1], hypotheses[i]) for i, n in enumerate(lengths)]

    def _search(
        self, states: List[DecodingState], ids: Tensor, last: Tensor, limit: int, kwargs: Any
    ) -> List[List[Dict[str, Tensor]]]:
        """What fairseq's own generator finds after the last words ``last [B]`` of prompts."""
        inner: Dict[str, Any] = {
            "net_input": {"src_tokens": last.unsqueeze(1), "src_lengths": torch.ones_like(last), "states": states},
            "id": ids,
        }
        # One text a column, whose limit was worked out before.
        factors, self.max_len_a, self.max_len_b = (self.max_len_a, self.max_len_b), 0, limit
        try:
            with counter(limit, "generated") as bar:
                self.model.bar = bar
                return super()._generate(inner, bos_token=last.repeat_interleave(self.beam_size), **kwargs)
        finally:
            self.model.bar = None
            self.max_len_a, self.max_len_b = factors

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
