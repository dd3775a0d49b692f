"""What happens between two updates, or inside one, and must leave no trace in a training run.

Each disturbance notes in the output how often it struck.
"""

import copy
from typing import Any, Callable, List

import torch

from .faults import fault

OUT_OF_MEMORY = "CUDA out of memory (injected)"


def struck(output: str) -> int:
    """How often the disturbance struck, by what the run printed."""
    return output.count("disturbed:")


def _strike(what: str) -> None:
    print(f"disturbed: {what}", flush=True)


def _before_every_update(disturb: Callable[[Any, List[Any]], None], on_rank: int = 0) -> None:
    from fairseq.trainer import Trainer

    step = Trainer.train_step

    def disturbed(self, samples, *args, **kwargs):
        if self.data_parallel_rank == on_rank:
            disturb(self, samples)
        return step(self, samples, *args, **kwargs)

    Trainer.train_step = disturbed


def _feed(trainer: Any, samples: List[Any]) -> None:
    for sample in samples:
        trainer.task.train_step(sample, trainer.model, trainer.criterion, trainer.optimizer, trainer.get_num_updates())


@fault
def hub_calls() -> None:
    """Somebody scores and continues a text with the model that is being trained."""

    def call(trainer, samples):
        model = trainer.get_model().eval()
        with torch.no_grad():
            model.decoder(torch.randint(4, 20, (3, 40)))
        _strike("hub call")

    _before_every_update(call)


@fault
def dummy_batches(on_rank: int = 0) -> None:
    """A rank that has run out of batches trains on the first one of the last validation, without weight."""

    def train_on_it(trainer, samples):
        sample, _ = trainer._prepare_sample(trainer._dummy_batch, is_dummy=True)
        model = trainer.get_model()
        trainer.task.train_step(
            sample, model, trainer.criterion, trainer.optimizer, trainer.get_num_updates(), ignore_grad=True
        )
        _strike("dummy batch")

    _before_every_update(train_on_it, on_rank)


@fault
def batches_fed_twice() -> None:
    """As after an overflow in mixed precision."""

    def feed(trainer, samples):
        trainer._set_seed()
        _feed(trainer, samples)
        _strike("batch fed before")

    _before_every_update(feed)


@fault
def looked_at_by_the_nan_detector() -> None:
    def look(trainer, samples):
        from fairseq.nan_detector import NanDetector

        with NanDetector(trainer.get_model()):
            _feed(trainer, samples)
        _strike("NaN detector")

    _before_every_update(look)


@fault
def copied() -> None:
    """Moving averages and ensembles copy the model, with whatever it remembers."""

    def copy_it(trainer, samples):
        twin = copy.deepcopy(trainer.get_model())
        assert twin.decoder.streams is not trainer.get_model().decoder.streams
        _strike("copy")

    _before_every_update(copy_it)


def _fails_once_in(place: str, every: int, on_rank: int) -> None:
    """Run out of memory once at the n-th, 2n-th, ... call of a place in the model."""
    import torch.distributed as dist
    from fairseq.criterions.cross_entropy import CrossEntropyCriterion

    from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

    count = [0]

    def due(training: bool) -> bool:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank != on_rank or training == (place == "validation"):
            return False
        count[0] += 1
        return count[0] % every == 0

    features, loss = FairseqMemoryDecoder.extract_features, CrossEntropyCriterion.forward

    def failing_features(self, *args, **kwargs):
        if place == "before the memory is written" and due(self.training):
            _strike(place)
            raise RuntimeError(OUT_OF_MEMORY)
        return features(self, *args, **kwargs)

    def failing_loss(self, model, sample, *args, **kwargs):
        result = loss(self, model, sample, *args, **kwargs)
        if place in ("after the memory is written", "validation") and due(model.training):
            _strike(place)
            raise RuntimeError(OUT_OF_MEMORY)
        return result

    FairseqMemoryDecoder.extract_features, CrossEntropyCriterion.forward = failing_features, failing_loss


@fault
def out_of_memory(place: str, every: int = 3, on_rank: int = 0) -> None:
    """The device's memory does not suffice once, in a forward pass."""
    _fails_once_in(place, every, on_rank)


@fault
def out_of_memory_in_the_backward_pass(every: int = 3) -> None:
    """Half of the gradients have been computed by then."""
    from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

    embed, count = FairseqMemoryDecoder.output_layer, [0]

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            count[0] += 1
            if count[0] % every == 0:
                _strike("backward pass")
                raise RuntimeError(OUT_OF_MEMORY)
            return gradient

    def output_layer(self, x):
        return embed(self, Failing.apply(x))

    FairseqMemoryDecoder.output_layer = output_layer


@fault
def out_of_memory_twice(segment: int) -> None:
    """The batch of a segment is dropped, and with it the update."""
    from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

    features, left = FairseqMemoryDecoder.extract_features, [2]

    def failing(self, src_tokens, src_lengths=None, position=None, *args):
        if torch.is_grad_enabled() and position.index == segment and left[0] > 0:
            left[0] -= 1
            _strike(f"segment {segment}")
            raise RuntimeError(OUT_OF_MEMORY)
        return features(self, src_tokens, src_lengths, position, *args)

    FairseqMemoryDecoder.extract_features = failing


@fault
def memory_spoilt(update: int, stream: int) -> None:
    """Before an update one stream's memory holds a NaN."""

    def spoil(trainer, samples):
        if trainer.get_num_updates() + 1 == update:
            position = samples[0]["net_input"]["position"]
            state = trainer.get_model().decoder.streams.read(position, training=True)
            state.tensors()[0][stream, 1] = float("nan")

    _before_every_update(spoil)


@fault
def weights_spoilt(update: int) -> None:
    """Before an update a weight is infinite."""

    def spoil(trainer, samples):
        if trainer.get_num_updates() + 1 == update:
            trainer.get_model().decoder.layers[0].feed_forward.fc1.weight.data[0] = float("inf")

    _before_every_update(spoil)


@fault
def weights_spoilt_after(update: int) -> None:
    """An update leaves a weight that is no number."""
    from fairseq.trainer import Trainer

    step = Trainer.train_step

    def spoiling(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if self.get_num_updates() == update:
            self.get_model().decoder.layers[0].feed_forward.fc1.weight.data[0] = float("nan")
        return result

    Trainer.train_step = spoiling


@fault
def gradients_thrown_away(update: int) -> None:
    """As in mixed precision, where the trainer takes a loss that is not finite for an overflow, and goes on."""
    from fairseq.trainer import Trainer

    weights_spoilt.__wrapped__(update)
    Trainer.clip_grad_norm = lambda self, clip_norm: torch.tensor(1.0)


@fault
def gradients_spoilt(update: int) -> None:
    """The backward pass of an update yields a gradient that is no number, and the loss is fine."""

    def spoil(trainer, samples):
        if trainer.get_num_updates() + 1 == update:
            weight = trainer.get_model().decoder.layers[0].feed_forward.fc1.weight
            weight.register_hook(lambda gradient: gradient * float("nan"))

    _before_every_update(spoil)
