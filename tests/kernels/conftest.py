import pytest

from lmoe.kernels import grid


@pytest.fixture(params=["stored", "stream"])
def order(request, monkeypatch):
    """The two orders of chunks: the second is what CUDA uses, where the lengths are not known on
    the host."""
    if request.param == "stream":
        init = grid.Grid.__init__
        monkeypatch.setattr(
            grid.Grid, "__init__", lambda self, *args: init(self, *args, stream_order=True)
        )
    return request.param
