"""Reading with a memory of the user's own: what it returns wrongly is named in one line, with the remedy."""

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from lamemo_fairseq.core.attention import Attended
from lamemo_fairseq.core.config import ModelConfig
from lamemo_fairseq.core.decoding.cache import FrozenCache, LayerCache
from lamemo_fairseq.core.fields import option
from lamemo_fairseq.core.kernels.padded import join
from lamemo_fairseq.core.layers import CausalSelfAttention
from lamemo_fairseq.core.memory import MEMORIES, MemoryOptions, MemoryState
from lamemo_fairseq.core.memory.base import LayerPassage, Memory, last_rows
from lamemo_fairseq.core.memory.recurrent import RecurrentMemory

from .helpers import random_tokens, tiny_decoder
from .own_memory import average


@pytest.mark.parametrize("positions", ["transformer-xl", "alibi", "rotary"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda rows: rows, "AverageMemory.reach returned 7: return the number of rows that the segment's tokens att"),
        (lambda rows: (rows, 3), r"AverageMemory.reach returned \(7, 3\): return the number of rows"),
        (lambda rows: (rows, range(1, 4)), "AverageMemory.reach returned distances ahead, .* looks_ahead = True in th"),
        (lambda rows: (rows - 3, None), "--memory recurrent: a segment attends to 7 rows, and the memory's reach ret"),
        (lambda rows: (rows + 1, None), "--memory recurrent: a segment attends to 7 rows, and the memory's reach ret"),
    ],
)
def test_a_wrong_reach_names_the_memory(monkeypatch, returned, message, positions):
    """Of too few distances, or too many, each key would have the score of another one."""

    def reach(self, state, current):
        return returned(RecurrentMemory.reach(self, state, current)[0])

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(reach=reach)})
    model = tiny_decoder(("recurrent", positions, "right"))
    tokens = random_tokens(2, 3)
    state = RecurrentMemory.initial_state(model.memory, model.embed(tokens))
    state = state.map(lambda rows: rows.new_ones(2, 4, rows.size(2)))
    with pytest.raises(ValueError, match=f"^{message}"):
        model.read(tokens, state)


def test_distances_ahead_that_a_class_promises(monkeypatch):
    """Weights of the distances ahead would never be trained, and several ranks would wait for their gradients."""
    message = r"^AverageMemory has looks_ahead = True, and its reach returned None for the distances ahead: return the"
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(looks_ahead=True)})
    with pytest.raises(ValueError, match=message):
        tiny_decoder(("recurrent", "disentangled", "right")).read(random_tokens(2, 3))


def read_twice(monkeypatch, keep, training, **members):
    """Read two segments with a memory whose state is what *keep* makes of a layer's rows."""

    def pass_layer(self, n, layer, rows, before, segment):
        joined = join(before[0], rows)
        out, _ = layer(joined, segment.biases[n], segment.tokens)
        return LayerPassage(out, (keep(joined),))

    monkeypatch.setattr(
        MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(pass_layer=pass_layer, **members)}
    )
    model = tiny_decoder(("recurrent", "transformer-xl", "right")).train(training)
    _, state, _ = model.read(random_tokens(2, 3))
    return model.read(random_tokens(2, 3), state)


@pytest.mark.parametrize("training", [True, False])
def test_a_state_of_more_rows_than_mem_len(monkeypatch, training):
    """Its tokens would attend further than the option says, in training and evaluation alike."""
    message = r"^AverageMemory returned a state of 6 rows a layer, and --mem-len is 4: keep the last 4, as by last_rows"
    with pytest.raises(ValueError, match=message):
        read_twice(monkeypatch, lambda rows: last_rows(rows, 1000), training)
    read_twice(monkeypatch, lambda rows: last_rows(rows, 4), training)
    rows_held = {"rows_held": lambda self, state: {"--compressed-len": (state.hidden[0].size(1), 6)}}
    read_twice(monkeypatch, lambda rows: last_rows(rows, 1000), training, **rows_held)


def test_a_state_with_a_gradient(monkeypatch):
    """torch would say, in the next update, that it goes through a graph a second time."""
    with pytest.raises(
        ValueError, match=r"^AverageMemory returned a state with a gradient, .*: call detach\(\) on its "
    ):
        read_twice(monkeypatch, lambda rows: rows[:, -4:], True)
    with torch.no_grad():
        read_twice(monkeypatch, lambda rows: rows[:, -4:], False)
    read_twice(monkeypatch, lambda rows: rows[:, -4:], True, carries_gradient=True)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda rows, slots: (rows, slots), "returned type tuple: return LayerPassage(rows, state)"),
        (lambda rows, slots: rows, "returned type Tensor: return LayerPassage(rows, state)"),
        (lambda rows, slots: None, "returned type NoneType: return LayerPassage(rows, state)"),
        (
            lambda rows, slots: LayerPassage(rows, slots),
            "returned a state that is a tensor [1, 3, 8]: return a tuple of tensors, (tensor,) for one",
        ),
        (lambda rows, slots: LayerPassage(rows, [slots]), "returned a state that is of type list: return a tuple"),
        (lambda rows, slots: LayerPassage(rows, (slots, None)), "returned a state that is a tuple of NoneType, Tensor"),
        (
            lambda rows, slots: LayerPassage(rows, (slots,) * 2),
            "returned 2 tensors as state, and got 1: return as many",
        ),
        (
            lambda rows, slots: LayerPassage((rows, None), (slots,)),
            "returned rows that are a tuple of NoneType, Tensor",
        ),
        (
            lambda rows, slots: LayerPassage(rows.float(), (slots,)),
            "returned rows in torch.float32, and got torch.float64: call .to(rows) on what it adds",
        ),
    ],
)
def test_a_layer_returns_its_passage(monkeypatch, returned, message):
    """One stream's tensor would be taken for a tuple; others would end within a host."""

    def pass_layer(self, n, layer, rows, before, segment):
        out, _ = layer(rows, segment.biases[n], segment.tokens)
        return returned(out, last_rows(rows, 4))

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(pass_layer=pass_layer)})
    with pytest.raises(ValueError, match=f"^{re.escape('AverageMemory.pass_layer ' + message)}"):
        tiny_decoder(("recurrent", "transformer-xl", "right")).read(random_tokens(1, 3))


@dataclass(frozen=True)
class AverageState(MemoryState):
    """Of another class than the one that the memory names."""

    hidden: Any = ()
    mean: Any = None
    count: Any = 0


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (AverageState, "AverageMemory{} returned a state of type AverageState, and the class names RecurrentState: "),
        (lambda rows: None, "AverageMemory{} returned a state of type NoneType, and the class names RecurrentState"),
        (
            lambda rows: RecurrentMemory.state((rows.transpose(0, 1), rows)),
            "AverageMemory{} returned a state whose hidden is [3, 2, 8] for 2 streams: return tensors with the streams",
        ),
        (
            lambda rows: RecurrentMemory.state((rows.sum(),)),
            "AverageMemory{} returned a state whose hidden is [] for 2",
        ),
        (
            lambda rows: RecurrentMemory.state([rows]),
            "AverageMemory{} returned a state whose hidden is of type list: return",
        ),
        (
            lambda rows: RecurrentMemory.state((rows.new_empty(2, 0, 8, device="meta"),)),
            "AverageMemory{} returned a state whose hidden is on meta, and the segment on cpu: make it of the segment",
        ),
        (lambda rows: RecurrentMemory.state(3), "AverageMemory{} returned a state whose hidden is of type int: return"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_state_is_made_of_tensors_with_the_streams_first(monkeypatch, made, message, first):
    """Streams elsewhere would be mixed up where single ones are cleared; another class would not be read again."""

    def initial_state(self, x):
        return made(x.new_zeros(2, 3, 8)) if first else RecurrentMemory.initial_state(self, x)

    def joined(self, parts, like):
        return made(parts[0][0])

    members = {"initial_state": initial_state, "joined": joined}
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(**members)})
    expected = message.format(".initial_state" if first else "")
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        tiny_decoder(("recurrent", "transformer-xl", "right")).read(random_tokens(2, 3))


@pytest.mark.parametrize("carries_gradient", [False, True])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda passage: (*passage,),
            "AverageMemory.pass_segment returned type tuple: return Passage(features, state)",
        ),
        (
            lambda passage: passage._replace(features=passage.features.repeat(1, 2, 1)),
            "AverageMemory returned features [2, 6, 8], and the segment is [2, 3, 8]: return the last layer's rows",
        ),
        (
            lambda passage: passage._replace(losses={"own": torch.zeros(())}),
            "AverageMemory returned losses, and its class says that it has none, so that training would not add them: ",
        ),
    ],
)
def test_a_segment_returns_its_passage(monkeypatch, made, message, carries_gradient):
    def pass_segment(self, *args):
        return made(RecurrentMemory.pass_segment(self, *args))

    members = {"pass_segment": pass_segment, "carries_gradient": carries_gradient}
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(**members)})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        tiny_decoder(("recurrent", "transformer-xl", "right")).read(random_tokens(2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_a_state_is_not_changed_in_place(monkeypatch, training):
    """A batch that is read again, as after an overflow, would be read with another memory."""

    def pass_layer(self, n, layer, rows, before, segment):
        out, _ = layer(join(before[0], rows), segment.biases[n], segment.tokens)
        return LayerPassage(out, (before[0].add_(rows.detach()) if before[0].size(1) else last_rows(rows, 3),))

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(pass_layer=pass_layer)})
    model, tokens = tiny_decoder(("recurrent", "transformer-xl", "right")).train(training), random_tokens(2, 3)
    with torch.set_grad_enabled(training):
        _, state, _ = model.read(tokens)
        with pytest.raises(
            ValueError, match=r"^AverageMemory changed the state before a segment in place, which .* clone\(\)$"
        ):
            model.read(tokens, state)
    with torch.inference_mode():  # whose tensors count no changes
        _, state, _ = model.eval().read(tokens)
        model.read(tokens, state)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"own": [torch.zeros(2, 3)]},
            "is of type list: a field of a cache is a tensor with the 2 sequences first, a Na",
        ),
        ({"own": 3}, "is of type int: a field of a cache is a tensor"),
        ({"own": torch.zeros(3, 2)}, "is [3, 2]: a field of a cache is a tensor with the 2 sequences first"),
        ({"own": torch.zeros(())}, "is []: a field of a cache"),
        ({"own": (torch.zeros(2), torch.zeros(2))}, "is of type tuple: a field of a cache"),
        ({"own": Attended(torch.zeros(2), torch.zeros(3))}, "is [3]: a field of a cache"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_fields_of_a_cache_that_cannot_be_reordered(monkeypatch, changed, message, later):
    """Beams would go on from the rows of others, or end within torch; also of what a segment has added."""

    class Cache(FrozenCache):
        @classmethod
        def empty(cls, memory, batch_size, like):
            cache = super().empty(memory, batch_size, like)
            vars(cache.layers[1]).update({} if later else changed)
            return cache

        def end_segment(self, sequences, position, network):
            super().end_segment(sequences, position, network)
            vars(self.layers[1]).update(changed)

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(cache=Cache)})
    model = tiny_decoder(("recurrent", "transformer-xl", "right"))
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{re.escape('LayerCache.own ' + message)}"):
        reader = model.reader(2)
        reader.read(list(random_tokens(2, 4)))
        reader.reorder([1, 0])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda layers: layers[:1],
            "Cache.empty returned 1 layers: return one for each of 2 layers",
        ),
        (
            lambda layers: [layers[0], LayerCache(*(t[:, :, 1:] for t in vars(layers[1]).values()))],
            "Cache.column_buffers yields a buffer [1, 2, 6, 4] with columns in dimension 2: make 7 of them, memory",
        ),
        (lambda layers: layers[:1] * 2, "Cache.empty returned one buffer twice: make new ones for every field of"),
    ],
)
def test_a_cache_of_other_layers(monkeypatch, made, message):
    """Layers that share a cache would attend to each other's keys, in silence."""
    refuse_cache(monkeypatch, lambda cache: replace(cache, layers=made(cache.layers)), message)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda cache: replace(cache, positions=cache.positions * 2),
            "Cache.empty returned 2 positions for 1 sequences: return [SequencePosition()] * batch_size",
        ),
        (lambda cache: replace(cache, slots=cache.tokens), "Cache.empty returned one buffer twice: make new ones"),
    ],
)
def test_a_cache_of_other_positions(monkeypatch, made, message):
    refuse_cache(monkeypatch, made, message)


def refuse_cache(monkeypatch, made, message):
    """Begin to decode with what is *made* of an empty cache, which is refused."""

    class Cache(FrozenCache):
        @classmethod
        def empty(cls, memory, batch_size, like):
            return made(super().empty(memory, batch_size, like))

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(cache=Cache)})
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        tiny_decoder(("recurrent", "transformer-xl", "right")).reader()


@pytest.mark.parametrize("returned", [lambda rows, second: rows, lambda rows, second: (rows, second, second)])
def test_an_attention_returns_a_pair(monkeypatch, returned):
    class OwnAttention(CausalSelfAttention):
        def forward(self, rows, bias, current):
            return returned(*super().forward(rows, bias, current))

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(attention=OwnAttention)})
    with pytest.raises(
        ValueError, match=r"^OwnAttention.forward returned type \w+: return the rows of merge_heads and a "
    ):
        tiny_decoder(("recurrent", "transformer-xl", "right")).read(random_tokens(2, 3))


@pytest.mark.parametrize("member", [{"span": property(lambda self: 3)}, {"nearest": 1}])
def test_layers_that_see_other_keys_are_not_decoded(monkeypatch, member):
    """Decoding would take those of the first layer for all, and the scores would be others."""
    narrow = type("NarrowAttention", (CausalSelfAttention,), member)
    members = {"attention_of": lambda self, layer: narrow if layer else CausalSelfAttention}
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(**members)})
    model = tiny_decoder(("recurrent", "transformer-xl", "right"))
    message = "CausalSelfAttention and NarrowAttention differ in span or nearest, and decoding token by token has one"
    with pytest.raises(ValueError, match=f"^{message}"):
        model.reader()


def test_a_loss_is_a_scalar(monkeypatch):
    """A criterion would add one for each stream to the sum of all."""

    def pass_segment(self, *args):
        return RecurrentMemory.pass_segment(self, *args)._replace(losses={"own": torch.zeros(2)})

    members = {"pass_segment": pass_segment, "has_losses": True}
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(**members)})
    with pytest.raises(ValueError, match=r"^AverageMemory returned a loss \[2\]: return scalars, means over tokens$"):
        tiny_decoder(("recurrent", "transformer-xl", "right")).read(random_tokens(2, 3))


def test_a_layer_gets_its_own_bias(monkeypatch):
    def pass_layer(self, n, layer, rows, before, segment):
        return RecurrentMemory.pass_layer(self, n, layer, rows, before, segment._replace(biases=[segment.biases] * 2))

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(pass_layer=pass_layer)})
    message = r"^--memory recurrent: attention got type list as a layer's bias: pass segment.biases\[n\]$"
    with pytest.raises(ValueError, match=message):
        tiny_decoder(("recurrent", "transformer-xl", "right")).read(random_tokens(2, 3))


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda: [nn.Linear(2, 2)], "list that .*: make it an nn.ModuleList or nn.ParameterList"),
        (lambda: (nn.Parameter(torch.ones(2)),), "tuple that .*: make it an nn.ModuleList"),
        (lambda: {"in": nn.Linear(2, 2)}, "dict that .*: make it an nn.ModuleDict or nn.ParameterDict"),
    ],
)
def test_weights_that_the_model_does_not_know(monkeypatch, made, kind):
    """They would be drawn anew when the model is loaded."""

    def init(self, config):
        Memory.__init__(self, config)
        self.gates = made()

    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "recurrent": average(__init__=init)})
    with pytest.raises(ValueError, match=rf"^AverageMemory\.gates is a {kind}"):
        tiny_decoder(("recurrent", "transformer-xl", "right"))


@dataclass(frozen=True)
class KindOptions(MemoryOptions):
    average_kind: str = option("mean", "the average that is kept", ("mean", "median"))


def test_a_value_that_is_none_of_the_choices(monkeypatch):
    monkeypatch.setattr(MEMORIES, "_entries", {**MEMORIES._entries, "average": average(options=KindOptions)})

    def configured(kind):
        options = {"average_kind": kind}
        return ModelConfig(9, 3, memory="average", position_encoding="transformer-xl", memory_options=options)

    assert configured("median").own_options.average_kind == "median"
    with pytest.raises(ValueError, match=r"^unknown --average-kind 'mode'; the known ones are mean, median$"):
        configured("mode")
