"""Parameters that an update does not read."""

import torch

from lamemo_fairseq.core.kernels.padded import PaddedRows, cut
from lamemo_fairseq.core.memory.unread import with_unread


def test_rows_stay_as_they_are_and_parameters_get_zeros():
    wide = torch.nn.functional.pad(torch.randn(2, 3, 5).half(), (0, 3))
    rows, read, unread = cut(wide, 5), torch.ones(5).half().requires_grad_(), torch.ones(2, 2).requires_grad_()
    assert isinstance(rows, PaddedRows)
    learned = rows * read
    same = with_unread(learned, [None, unread])
    of_read, of_unread = torch.autograd.grad(same.sum(), [read, unread])
    assert torch.equal(same, learned) and of_unread.shape == (2, 2) and not of_unread.any()
    torch.testing.assert_close(of_read, learned.detach().sum((0, 1)), rtol=0, atol=0.02)
    padded = with_unread(rows, [unread])
    assert isinstance(padded, PaddedRows) and padded.data_ptr() == rows.data_ptr() and padded.requires_grad


def test_a_parameter_may_be_read_besides():
    parameter = torch.tensor([2.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(with_unread(parameter * parameter, [parameter]).sum(), parameter)
    assert gradient.tolist() == [4, 6]


def test_without_gradient_nothing_is_recorded():
    rows = torch.randn(2, 3)
    with torch.no_grad():
        assert with_unread(rows, [torch.ones(1, requires_grad=True)]) is rows
    assert with_unread(rows, [None]) is rows


def test_rows_may_be_changed_afterwards():
    rows = torch.zeros(2, 3)
    with_unread(rows, [torch.ones(1, requires_grad=True)]).add_(1)
    assert rows.sum() == 6
