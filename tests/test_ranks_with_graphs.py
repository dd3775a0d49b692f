"""Ranks that replay graphs, whose gradients are reduced meanwhile, compute what ranks without graphs compute.

Two ranks add two numbers, in whatever order, so that their runs are compared to the last bit. A CPU replays with
stand-ins for graphs. `test_ranks.py` compares ranks without graphs with a single rank.
"""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq.trainer import Trainer

from lamemo_fairseq.host.data_parallel import GradientReducer
from lamemo_fairseq.host.mixed_precision import FP16Optimizer
from lamemo_fairseq.host.trainer import SegmentTrainer

from .faults import die, fault
from .gpus import gpus
from .helpers import ON_GPU, TASK, write_data
from .processes import assert_same_run, output_of, train_in_processes

MODEL = [
    "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32,
    "--tokens-per-sample", 16, "--mem-len", 16, "--dropout", 0.1, "--batch-size", 2,
]  # fmt: skip
TRAIN = [
    *MODEL, "--optimizer", "adam", "--lr", 5e-3, "--clip-norm", 0.5, "--no-epoch-checkpoints",
    "--save-interval-updates", 5, "--max-valid-steps", 2,
]  # fmt: skip
SEGMENTS = 12  # an epoch; the last one is one token for the first stream of the first rank, and padding for the others


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=4 * 16 * (SEGMENTS - 1) + 1, valid=150)


@fault
def together(*faults):
    for arrange in faults:
        arrange()


@fault
def graphs_on_cpus(rank=None, after=0, every=0):
    """Segments are replayed, in small buckets; but one rank's first *after* are not, and later not each *every*-th."""
    from lamemo_fairseq.core import graphs
    from lamemo_fairseq.models.decoder import FairseqMemoryDecoder

    from .core import fake_graphs

    fake_graphs.install(SimpleNamespace(setattr=setattr))
    build, reducer, count = FairseqMemoryDecoder.__init__, GradientReducer.__init__, [0]
    begin_step, begin_segment = FP16Optimizer.begin_step, graphs._TrainingRecording.begin
    begin, begin_rest, figures = GradientReducer.begin, GradientReducer.begin_rest, Trainer._fast_stat_sync_sum

    def with_graphs(self, *args):
        build(self, *args)
        self.graphs = graphs.SegmentGraphs()
        for p in self.parameters():  # the first rank's weights are to replace others
            p.data += dist.get_rank()

    def recordable(tokens):
        count[0] += torch.is_grad_enabled()
        return rank != dist.get_rank() or (count[0] > after and not (every and count[0] % every == 0))

    def in_small_buckets(self, parameters, outside, group, bucket_bytes):
        reducer(self, parameters, outside, group, 4096)
        assert len(self.buckets) > 2

    def telling(self):
        reduces = begin(self)
        print("reduced in a replay" if reduces else "added up in a replay", flush=True)
        return reduces

    def telling_rest(self):
        print("the rest of the gradients", flush=True)
        begin_rest(self)

    def telling_figures(self, *args, **kwargs):
        if self._updating:
            print("figures" if self.data_parallel_process_group is not self._reducer._group else "behind", flush=True)
        return figures(self, *args, **kwargs)

    def telling_step(self, *args):
        begins = begin_step(self, *args)
        print("an update ahead" if begins else "an update behind", flush=True)
        return begins

    def telling_segment(self, *args):
        begun = begin_segment(self, *args)
        print("a segment ahead", flush=True)
        return begun

    FP16Optimizer.begin_step, graphs._TrainingRecording.begin = telling_step, telling_segment
    FairseqMemoryDecoder.__init__, graphs._recordable = with_graphs, recordable
    GradientReducer.__init__, GradientReducer.begin, GradientReducer.begin_rest = (
        in_small_buckets,
        telling,
        telling_rest,
    )
    Trainer._fast_stat_sync_sum = telling_figures


@fault
def killed_while_reducing(rank, update):
    """One of the ranks, with half of its buckets reduced."""
    step, reduce = SegmentTrainer.train_step, GradientReducer.reduce
    updates = [0]

    def noting(self, *args, **kwargs):
        updates[0] = self.get_num_updates() + 1
        return step(self, *args, **kwargs)

    def dying(self, bucket, ready):
        if dist.get_rank() == rank and updates[0] == update and bucket is self.buckets[-1]:
            die()
        reduce(self, bucket, ready)

    SegmentTrainer.train_step, GradientReducer.reduce = noting, dying


@fault
def dummy_batch(rank, update):
    """One rank's batch has no weight, as that of one that has none left."""
    prepare = SegmentTrainer._prepare_sample

    def weightless(self, sample, *args, **kwargs):
        sample, dummy = prepare(self, sample, *args, **kwargs)
        due = self._updating and dist.get_rank() == rank and self.get_num_updates() + 1 == update
        if due:
            print("a dummy batch", flush=True)
        return sample, dummy or due

    SegmentTrainer._prepare_sample = weightless


@fault
def overflow(rank, update):
    """One rank's gradients overflow once."""
    step, due = SegmentTrainer.train_step, [True]

    def overflowing(self, samples, *args, **kwargs):
        scale = self.optimizer.scaler.loss_scale
        if due[0] and self.get_num_updates() + 1 == update:
            due[0] = False
            if dist.get_rank() == rank:
                self.optimizer.scaler.loss_scale = float("inf")
        result = step(self, samples, *args, **kwargs)
        if self.optimizer.scaler.loss_scale == float("inf"):
            self.optimizer.scaler.loss_scale = scale / 2
        return result

    torch.Tensor.cuda = lambda self: self  # fairseq's answer to an overflow needs a GPU
    SegmentTrainer.train_step = overflowing


def replays(folder, rank):
    """How many gradients a rank reduced in replays, and how many it added up first."""
    output = output_of(folder, rank)
    return len(re.findall("^reduced in a replay", output, re.M)), len(re.findall("^added up in a replay", output, re.M))


AVERAGED = [
    "--roll", "--update-freq", "1,2", "--max-update", 16, "--store-ema", "--ema-decay", 0.9,
    "--ema-fp32", "--bf16", "--fp16-scale-window", 128,
]  # fmt: skip


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory):
    """A run without graphs: an epoch of updates of one batch, then updates of two batches."""
    folder = tmp_path_factory.mktemp("whole")
    command = [data, *TASK, "--arch", "lamemo_lm", *TRAIN, *AVERAGED]
    assert train_in_processes(command, folder, ranks=2) == [0, 0], output_of(folder)[-3000:]
    return command, folder


def averages(folder):
    return torch.load(folder / "checkpoints" / "checkpoint_last.pt", weights_only=False)["extra_state"]["ema"]


def assert_same_averages(one, other):
    wanted, found = averages(one), averages(other)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_ranks_that_record_at_different_updates(averaged, tmp_path):
    command, whole = averaged
    late = graphs_on_cpus(rank=1, after=4, every=3)
    assert train_in_processes(command, tmp_path, ranks=2, fault=late) == [0, 0], output_of(tmp_path)[-3000:]
    (first, added), (second, _) = replays(tmp_path, 0), replays(tmp_path, 1)
    assert first > second > 0 and added > 0
    assert_same_run(whole, tmp_path)
    assert_same_averages(whole, tmp_path)
    for rank in (0, 1):  # no rank waits for another's figures with gradients that the other waits for
        told = re.findall("^(?:the rest of the gradients|figures|behind)", output_of(tmp_path, rank), re.M)
        assert told == ["the rest of the gradients", "figures", "the rest of the gradients"] * 16
        output = output_of(tmp_path, rank)
        assert output.count("an update ahead") == 16 and "an update behind" not in output
        assert output.count("a segment ahead") > 0


def test_a_run_resumes_after_a_rank_was_killed_while_reducing(averaged, tmp_path):
    """Graphs are recorded at other updates than before."""
    command, whole = averaged
    killed = together(graphs_on_cpus(), killed_while_reducing(rank=1, update=8))
    codes = train_in_processes(command, tmp_path, ranks=2, fault=killed)
    assert codes[1] == -9 and codes[0] != 0
    assert train_in_processes(command, tmp_path, ranks=2, fault=graphs_on_cpus()) == [0, 0]
    assert replays(tmp_path, 0)[0] > 0
    assert_same_run(whole, tmp_path)
    assert_same_averages(whole, tmp_path)


def test_overflow_a_dummy_batch_and_a_memory_with_losses(data, tmp_path):
    """In half precision, where all ranks skip an update if the gradients of one overflow."""
    command = [data, *TASK, "--arch", "compressive_transformer_lm", *TRAIN, "--max-update", 8]
    command += ["--compressed-len", 4, "--compression-rate", 4, "--fp16", "--memory-efficient-fp16"]
    odd = together(dummy_batch(rank=1, update=6), overflow(rank=1, update=7))
    for name, faults in (("whole", odd), ("graphs", together(graphs_on_cpus(), odd))):
        codes = train_in_processes(command, tmp_path / name, ranks=2, fault=faults)
        output = output_of(tmp_path / name)
        assert codes == [0, 0] and "a dummy batch" in output and output.count("gradient overflow detected") == 1, output
    assert replays(tmp_path / "graphs", 0)[0] > 0 and replays(tmp_path / "graphs", 1)[0] > 0
    assert_same_run(tmp_path / "whole", tmp_path / "graphs")


@fault
def all_gradients_after_the_pass():
    """Graphs are replayed; what they computed is reduced when they have ended."""
    GradientReducer.begin = lambda self: False


@gpus
@pytest.mark.parametrize(
    "options", [("--fp16",), ("--bf16", "--update-freq", "1,2", "--fp16-scale-window", "128")], ids=" ".join
)
def test_two_gpus_compute_the_same_with_and_without_overlap(options, data, tmp_path):
    command = [
        data, *ON_GPU, "--arch", "lamemo_lm", *TRAIN, "--decoder-embed-dim", 64, "--decoder-ffn-embed-dim", 4096,
        "--bucket-cap-mb", 1, "--max-update", 40, "--cuda-graphs", "--criterion", "chunked_cross_entropy", *options,
    ]  # fmt: skip
    for name, arranged in (("after", all_gradients_after_the_pass()), ("meanwhile", None)):
        codes = train_in_processes(command, tmp_path / name, ranks=2, fault=arranged)
        assert codes == [0, 0], output_of(tmp_path / name)[-3000:]
    assert_same_run(tmp_path / "after", tmp_path / "meanwhile")
