"""The task's side of continuing and scoring prompts."""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from omegaconf.errors import OmegaConfBaseException

from ..data.folders import data_folders
from ..data.text import clean_prompt
from ..evaluation.words import check_post_process
from ..generation import PromptDataset, PromptGenerator, StreamingScorer
from ..generation.encoders import PromptCoding
from ..generation.lines import encode_prompts
from ..generation.prompts import targets_of
from ..host.generation_options import check_generation, refusal, warn_without_effect
from ..host.own import OwnTask


class PromptTask(OwnTask, FairseqTask):
    """Prompts to word ids, in batches, to a generator or scorer."""

    dictionary: Dictionary
    _trains: bool
    coding: Optional[PromptCoding] = None  # of prompts, from the time that a tokenizer is asked for

    def get_interactive_tokens_and_lengths(self, lines: List[str], encode_fn: Callable[[str], str]) -> Any:
        """Return the word ids of the prompts of fairseq-interactive, and the number of ids of each."""
        encoded = encode_prompts([clean_prompt(line) for line in lines], encode_fn, self.dictionary, self.coding)
        return encoded, [len(ids) for ids in encoded]

    def build_tokenizer(self, args: Any) -> Any:
        """Build the tokenizer that is named, or the data folder's if neither a tokenizer nor ``--bpe`` is named."""
        joins = self._option("post_process")
        check_post_process(joins)
        self.coding = PromptCoding(data_folders(self.cfg.data)[0], joined=joins not in (None, "none"))
        return self.coding.build_coder("tokenizer", args, super().build_tokenizer)

    def build_bpe(self, args: Any) -> Any:
        """Build the coder of pieces, chosen in the same way. fairseq asks for the tokenizer first."""
        assert self.coding is not None
        return self.coding.build_coder("bpe", args, super().build_bpe)

    def build_dataset_for_inference(self, src_tokens: Any, src_lengths: Any, **kwargs: Any) -> PromptDataset:
        """Return whole texts to score or continue, each read from an empty memory after an end-of-sentence token."""
        return PromptDataset(src_tokens, self.dictionary)

    def build_generator(
        self,
        models: Any,
        args: Any,
        seq_gen_cls: Any = None,
        extra_gen_cls_kwargs: Any = None,
        prefix_allowed_tokens_fn: Any = None,
    ) -> Any:
        """Build a generator that reads prompts into the memory first, or with ``score_reference`` a scorer."""
        check_generation(args)
        warn_without_effect(args)
        if getattr(args, "score_reference", False):
            return StreamingScorer(self.target_dictionary)
        return super().build_generator(
            models, args, seq_gen_cls or PromptGenerator, extra_gen_cls_kwargs, prefix_allowed_tokens_fn
        )

    def inference_step(
        self, generator: Any, models: Any, sample: Dict[str, Any], prefix_tokens: Any = None, constraints: Any = None
    ) -> Any:
        """Continue or score the texts of a batch."""
        if constraints is not None:
            raise NotImplementedError(refusal("constraints"))
        if "target" not in sample:  # from fairseq-interactive, to be scored
            sample = {**sample, "target": targets_of(sample["net_input"]["src_tokens"])}
        with torch.no_grad():
            return generator.generate(models, sample, prefix_tokens=prefix_tokens)

    def _shard(self, ranks: int, rank: int) -> Tuple[int, int]:
        """Return the number of shards and the index of this one: those of ``--num-shards``, or of several ranks.

        Raises:
            ValueError: there is no such shard, both are asked for, or a training split would be divided.
        """
        asked = self._option("num_shards") or 1, self._option("shard_id") or 0
        if asked[0] == 1 or asked == (ranks, rank):
            return ranks, rank
        if not 0 <= asked[1] < asked[0]:
            raise ValueError(f"--shard-id {asked[1]} is none of --num-shards {asked[0]}: pass 0 to {asked[0] - 1}")
        if self._trains or ranks > 1:
            raise ValueError(
                f"--num-shards {asked[0]} is for one process that evaluates or generates, and several ranks divide the "
                "data themselves: leave it out"
            )
        return asked

    def _option(self, name: str) -> Any:
        """Return an option of another section of fairseq's configuration, None outside of a command."""
        try:
            value = getattr(self.cfg, name)
        except OmegaConfBaseException:
            return None
        return None if isinstance(value, str) and value.startswith("${") else value
