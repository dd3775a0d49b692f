"""The `gpu` marker selects every test that uses a GPU."""

from .gpus import check_marks


def test_whatever_uses_a_gpu_is_marked(request):
    check_marks(request.session.items)
