"""Memory on huge pages: what is asked for, what the system gave, and where that can't be told."""

import gc

import pytest
import torch

from moeprof.backends import pages
from moeprof.backends.pages import PAGE, advised, huge_pages, huge_share

pytestmark = pytest.mark.once
LARGE = (4, 5, PAGE)


@pytest.mark.parametrize("shape", [(2, 3, 64), LARGE, (1,), (0, 4)])
def test_it_is_memory_as_any_other(shape):
    made = advised(shape)
    assert made.shape == shape and made.dtype == torch.uint8 and made.is_contiguous()
    made.random_(0, 255)
    kept = made.clone()
    torch.empty(1 << 22, dtype=torch.uint8).fill_(1)
    assert torch.equal(made, kept)


def test_large_ones_begin_on_a_page_and_outlive_what_made_them():
    view = advised(LARGE)[1]
    gc.collect()
    view.fill_(7)
    assert view.data_ptr() % PAGE == 0 and view.sum() == 7 * 5 * PAGE


def test_without_leave_it_is_usual_memory(monkeypatch):
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert advised(LARGE).fill_(1).sum() == 20 * PAGE


def test_how_much_lies_on_huge_pages():
    if huge_pages() not in ("always", "madvise"):
        pytest.skip("the system gives no huge pages")
    made = advised(LARGE).fill_(1)
    assert huge_share([made]) > 0.5


def test_the_share_is_of_the_bytes(monkeypatch, tmp_path):
    """Two pieces of memory, of which one lies on huge pages by half; a tensor in each."""
    a, b = torch.zeros(1000, dtype=torch.uint8), torch.zeros(3000, dtype=torch.uint8)
    lines = []
    for tensor, huge in ((a, 50), (b, 0)):
        at = tensor.data_ptr()
        lines += [f"{at:x}-{at + tensor.nbytes:x} rw-p 0 00:00 0", "Rss: 100 kB"]
        lines += [f"AnonHugePages: {huge} kB"]
    maps = tmp_path / "smaps"
    maps.write_text("\n".join(lines))
    monkeypatch.setattr(pages, "MAPS", maps)
    assert huge_share([a]) == 0.5 and huge_share([b]) == 0
    assert huge_share([a, b]) == pytest.approx(0.125)
    assert huge_share([]) is None
    monkeypatch.setattr(pages, "MAPS", tmp_path / "none")
    assert huge_share([a]) is None


def test_who_gets_them_is_read_from_the_system(monkeypatch, tmp_path):
    setting = tmp_path / "enabled"
    monkeypatch.setattr(pages, "SETTING", setting)
    assert huge_pages() == ""
    for text, word in (("always [madvise] never", "madvise"), ("[always] madvise never", "always")):
        setting.write_text(text)
        assert huge_pages() == word
