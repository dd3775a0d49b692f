"""What a saved memory depends on: the options that a resumed run has to share with it."""

import torch
from fairseq.dataclass import ChoiceEnum

from lamemo_fairseq.core.memory.compressive import COMPRESSIONS

from .helpers import random_tokens, tiny_decoder

COMPRESSIVE, CONTINUOUS = ("compressive", "transformer-xl", "conv"), ("continuous", "transformer-xl", "right")
TOKEN = ("token", "transformer-xl", "right")


def test_a_run_goes_on_with_the_same_basis_alone():
    """The coefficients of one mean nothing in another; how they are updated may change."""
    names = set(tiny_decoder(CONTINUOUS).streams.options)
    assert names == {"--memory", "--mem-len", "--num-basis-functions", "--basis-widths"}


def test_what_a_saved_memory_depends_on_is_stored_as_plain_values():
    """Options from hydra come as members of an enumeration that no checkpoint can hold."""
    decoder = tiny_decoder(COMPRESSIVE, compression=ChoiceEnum(COMPRESSIONS.names())("conv"))
    expected = {"--memory": "compressive", "--mem-len": 4, "--compressed-len": 3, "--compression-rate": 2}
    assert decoder.streams.options == {**expected, "--compression": "conv"}
    assert {type(value) for value in decoder.streams.options.values()} == {int, str}


def test_a_saved_store_is_one_layers_keys_and_values():
    """How many of them a query reads may change."""
    names = set(tiny_decoder(("memorizing", "transformer-xl", "top-k"), retrieved_rows=3).streams.options)
    assert names == {"--memory", "--mem-len", "--store-len", "--store-layer", "--retrieval"}


def test_a_saved_memory_depends_on_the_number_of_tokens_and_of_cached_rows():
    decoder = tiny_decoder(TOKEN, memory_tokens=5, mem_len=0)
    assert decoder.streams.options == {"--memory": "token", "--mem-len": 0, "--memory-tokens": 5}
    _, state, _ = decoder.read_segment(random_tokens(2, 3), None)
    assert state.tokens.shape == (2, 5, 8) and {t.shape for t in state.hidden} == {(2, 0, 8)}


def test_a_saved_memory_depends_on_the_number_of_states_and_on_their_layers():
    decoder = tiny_decoder(("block-recurrent", "t5", "lstm"), recurrent_layers="2,1")
    expected = {"--memory": "block-recurrent", "--mem-len": 4, "--recurrent-states": 3, "--recurrent-layers": "2,1"}
    assert decoder.streams.options == expected
    _, state, _ = decoder.read_segment(random_tokens(2, 3), None)
    assert {t.shape for t in state.states} == {(2, 3, 8)} and len(state.states) == 2


def test_a_saved_matrix_depends_on_the_width_of_its_keys():
    """The tokens are weights, and may be others; matrices come back from what a checkpoint holds, in float32."""
    decoder = tiny_decoder(("associative", "transformer-xl", "right"), associative_dim=5, dtype=torch.float16)
    assert decoder.streams.options == {
        "--memory": "associative",
        "--mem-len": 4,
        "--associative-dim": 5,
        "--associative-decay": 1.0,
    }
    _, state, _ = decoder.read_segment(random_tokens(2, 3), None)
    assert {t.shape for t in state.matrices} == {(2, 30, 8)} and {t.shape for t in state.normalizers} == {(2, 30)}
    again = type(state).from_dict(state.to_dict())
    for one, other in zip(again.tensors(), state.tensors(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert {t.dtype for t in again.matrices} == {torch.float32}
