"""Which gradients are reduced when, and for what the host waits meanwhile."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq.trainer import Trainer
from torch import nn

from lamemo_fairseq.host import data_parallel
from lamemo_fairseq.host.data_parallel import GradientReducer, GraphDataParallel, reducer_for, wrapped
from lamemo_fairseq.host.ranks import group_between_hosts
from lamemo_fairseq.host.trainer import SegmentTrainer

from .helpers import tiny_decoder

RANKS = 2


class Layers(nn.Module):
    """Parameters, and the collectives of a rank whose others have the same gradients."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.output = nn.Linear(4, 9)
        self.collectives = []
        monkeypatch.setattr(dist, "get_world_size", lambda group: RANKS)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        self.reducer = GradientReducer(list(self.parameters()), list(self.output.parameters()), "group", 80)

    def all_reduce(self, tensor, group, async_op):
        assert (group, async_op) == ("group", True)
        self.collectives.append(tensor.numel())
        return SimpleNamespace(wait=lambda: tensor.mul_(RANKS))

    def gradients(self, seed=0):
        torch.manual_seed(seed)
        return {p: torch.randn_like(p) for p in self.parameters()}

    def pass_backward(self, gradients, replayed):
        """As autograd does it, and a graph."""
        outside = set(self.output.parameters())
        reduces = replayed and self.reducer.begin()
        for bucket in self.reducer.buckets if reduces else ():
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                view.copy_(gradients[p])
            self.reducer.reduce(bucket, None)
        for p, gradient in gradients.items():
            if p.requires_grad and not (reduces and p not in outside):
                p.grad = gradient.clone() if p.grad is None else p.grad + gradient


@pytest.fixture
def layers(monkeypatch):
    return Layers(monkeypatch)


def test_collectives_do_not_depend_on_what_a_rank_does(layers):
    """Their number, order and sizes, whether segments are replayed, added up, or missing."""
    seen = set()
    for passes in ([True], [False], [True, True], [True, False], [False, False], []):
        layers.collectives.clear()
        layers.zero_grad()
        layers.reducer.begin_update(max(1, len(passes)))
        wanted = {p: torch.zeros_like(p) for p in layers.parameters()}
        for seed, replayed in enumerate(passes):
            given = layers.gradients(seed)
            layers.pass_backward(given, replayed)
            wanted = {p: wanted[p] + given[p] for p in wanted}
        assert bool(layers.collectives) == (passes == [True])
        layers.reducer.begin_rest()
        layers.reducer.finish()
        assert all(torch.equal(p.grad, wanted[p]) for p in wanted)
        seen.add(tuple(layers.collectives))
    assert seen == {(20, 20, 20, 9, 36)}


def test_replays_outside_of_an_update_reduce_nothing(layers):
    layers.pass_backward(layers.gradients(), replayed=True)
    layers.reducer.begin_update(1)
    layers.zero_grad()
    layers.pass_backward(layers.gradients(), replayed=True)
    layers.reducer.finish()
    done = len(layers.collectives)
    layers.pass_backward(layers.gradients(), replayed=True)
    assert len(layers.collectives) == done == 5


def test_two_backward_passes_of_a_batch_are_refused(layers):
    layers.reducer.begin_update(1)
    layers.pass_backward(layers.gradients(), replayed=True)
    with pytest.raises(RuntimeError, match=r"second backward pass .* leave out --cuda-graphs"):
        layers.pass_backward(layers.gradients(), replayed=True)


@pytest.mark.parametrize("replayed", [True, False])
def test_a_gradient_from_elsewhere_is_reduced_or_refused(replayed, layers):
    """Such as that of a penalty on weights, which a criterion may add."""
    layers.reducer.begin_update(1)
    given = layers.gradients()
    layers.pass_backward(given, replayed)
    weight = layers.layers[0].weight
    more = torch.ones_like(weight)
    weight.grad = more if weight.grad is None else weight.grad + more
    if replayed:
        with pytest.raises(RuntimeError, match=r"a loss of its own, .* leave out --cuda-graphs"):
            layers.reducer.finish()
    else:
        layers.reducer.finish()
        assert torch.equal(weight.grad, given[weight] + more)


def test_layers_frozen_and_trained_again(layers):
    """As with legacy_ddp: what is trained during an update is reduced."""
    for trained, collectives in ((True, [20, 20, 20, 9, 36]), (False, [20, 20, 9, 36]), (True, [20, 20, 20, 9, 36])):
        layers.layers[1].requires_grad_(trained)
        layers.collectives.clear()
        layers.zero_grad()
        layers.reducer.begin_update(1)
        layers.pass_backward(layers.gradients(), replayed=True)
        layers.reducer.finish()
        assert layers.collectives == collectives
        assert all((p.grad is not None) == p.requires_grad for p in layers.parameters())


def test_no_sync_reduces_nothing(layers):
    wrapper = GraphDataParallel(layers, layers.reducer, None)
    layers.reducer.begin_update(2)
    with wrapper.no_sync():
        layers.pass_backward(layers.gradients(), replayed=True)
        wrapper.all_reduce_grads()
    assert layers.collectives == []
    wrapper.all_reduce_grads()
    assert len(layers.collectives) == 5


OPTIONS = {"ddp_backend": "pytorch_ddp", "ddp_comm_hook": "none", "bucket_cap_mb": 25, "heartbeat_timeout": -1}


@pytest.mark.parametrize(
    ("changed", "ours"),
    [
        ({}, True),
        ({"ddp_backend": "legacy_ddp"}, True),
        ({"ddp_backend": "fully_sharded"}, False),
        ({"ddp_comm_hook": "fp16"}, False),
        ({"cuda_graphs": False}, False),
    ],
    ids=str,
)
def test_who_reduces(changed, ours, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: RANKS)
    decoder = tiny_decoder(cuda_graphs=changed.get("cuda_graphs", True))
    model = nn.Module()
    model.decoder = decoder
    reducer = reducer_for(SimpleNamespace(**{**OPTIONS, **changed}), model, None)
    assert (reducer is not None) == ours
    if ours:
        assert decoder.graphs.reducer is reducer
        within = {id(p) for bucket in reducer.buckets for p in bucket.parameters}
        outside = {id(p) for p in decoder.loss_layer.parameters()}
        assert within == {id(p) for p in decoder.parameters()} - outside


@pytest.mark.parametrize("seconds", [-1, 60])
def test_the_wrapper_is_fairseqs_but_for_the_reducer(seconds, layers, monkeypatch):
    """--heartbeat-timeout ends a rank that makes no progress."""
    sent, limits = [], []
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: 7 + rank)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src, group: sent.append((tensor.numel(), src, group)))
    monkeypatch.setattr(
        data_parallel, "DistributedTimeoutWrapper", lambda module, timeout: limits.append(timeout) or module
    )
    model = wrapped(SimpleNamespace(heartbeat_timeout=seconds), layers, layers.reducer, "group")
    assert limits == ([seconds] if seconds > 0 else [])
    assert model.state_dict().keys() == layers.state_dict().keys()
    assert sent == [(t.numel(), 7, "group") for t in layers.state_dict().values()]
    assert model.all_reduce_grads and model.no_sync


class Stream:
    """Notes what it waits for."""

    def __init__(self):
        self.waits = []
        self.wait_event = self.wait_stream = self.waits.append


@pytest.fixture
def trainer(monkeypatch):
    """One of several ranks on GPUs, and the stream of its figures."""
    made = SegmentTrainer.__new__(SegmentTrainer)
    made._group, made._group_of_figures, made._reducer, made._updating = None, "figures", None, True
    made.device, made.task, made.stream = torch.device("cuda"), SimpleNamespace(scored="scored"), Stream()
    monkeypatch.setattr("lamemo_fairseq.host.ahead._beside", lambda device: made.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "all before")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


@pytest.mark.parametrize(
    ("updating", "scored", "sample_size", "waits"),
    [
        (True, "scored", 32.0, ["scored"]),
        (True, "scored", torch.tensor(32.0), ["scored", "all before"]),  # where a criterion computes it
        (True, None, 32.0, ["all before"]),
        (False, "scored", 32.0, ["all before"]),  # in validation
    ],
)
def test_figures_wait_for_the_loss_and_no_more(updating, scored, sample_size, waits, trainer, monkeypatch):
    trainer._updating, trainer.task.scored, groups = updating, scored, []

    def aggregate(self, logging_outputs, *stats, ignore):
        groups.append((self.data_parallel_process_group, self.device.type))
        return logging_outputs, stats

    monkeypatch.setattr(Trainer, "_aggregate_logging_outputs", aggregate)
    assert trainer._aggregate_logging_outputs([{"loss": 2.0}], sample_size, 0) == ([{"loss": 2.0}], (sample_size, 0))
    assert (groups, trainer.stream.waits, trainer._group) == ([("figures", "cpu")], waits, None)
    assert trainer.device.type == "cuda"


@pytest.mark.parametrize(("on_the_device", "waits"), [(False, []), (True, ["all before"])])
def test_norms_wait_for_nothing_if_the_host_has_them(on_the_device, waits, trainer, monkeypatch):
    groups = []
    monkeypatch.setattr(
        Trainer, "_check_grad_norms", lambda self, norm: groups.append(self.data_parallel_process_group)
    )
    trainer._check_grad_norms(SimpleNamespace(is_cuda=on_the_device))
    assert (groups, trainer.stream.waits, trainer._group) == (["figures"], waits, None)


def test_hosts_that_do_not_reach_each_other_are_told_the_remedy(monkeypatch):
    def unreachable(backend):
        raise RuntimeError(f"no {backend}")

    monkeypatch.setattr(dist, "new_group", unreachable)
    with pytest.raises(RuntimeError, match=r"by gloo, which failed \(no gloo\): set GLOO_SOCKET_IFNAME"):
        group_between_hosts()
