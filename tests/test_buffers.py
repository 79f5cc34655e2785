"""Maps' memory is used again only where nothing can see it any more."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from el_convert import binarize, pack
from el_convert.kernels import buffers
from el_convert.kernels.buffers import MapPool, shared_pool

pytestmark = pytest.mark.filterwarnings("ignore:the model looks untrained")

SIZE = (1, 8, 64, 64)


def test_a_map_is_as_torch_would_make_it() -> None:
    map = MapPool().take(2, 8, 64, 48)
    assert map.shape == (2, 8, 64, 48)
    assert map.dtype == torch.float32
    assert map.is_contiguous(memory_format=torch.channels_last)
    assert not map._is_view()
    assert map.data_ptr() % 64 == 0
    map.squeeze_(0).resize_(8)  # what tensors made by detach() refuse


def test_idle_memory_comes_back() -> None:
    pool = MapPool()
    places = {pool.take(*SIZE).data_ptr() for _ in range(20)}
    assert len(places) == 1


def test_smaller_maps_use_the_same_memory() -> None:
    pool = MapPool()
    place = pool.take(1, 8, 64, 64).data_ptr()
    half = pool.take(1, 4, 64, 64)
    assert half.data_ptr() == place
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert pool.take(1, 8, 64, 64).data_ptr() != place  # the half is in use


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "the map": lambda m: m,
    "a view": lambda m: m[0, :, 3:5],
    "detached": lambda m: m.detach(),
    "numpy": lambda m: m.numpy(),
    "a view of numpy": lambda m: m.numpy()[0, 1:, ::2],
    "dlpack": lambda m: np.from_dlpack(m),
    "storage": lambda m: m.untyped_storage(),
    "a graph": lambda m: m * torch.ones(1, requires_grad=True),
    "a parameter": lambda m: nn.Parameter(m),
    "memoryview": lambda m: memoryview(m.numpy()),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_in_use_stays(holder: str) -> None:
    pool = MapPool()
    place = pool.take(*SIZE).data_ptr()
    held = HOLDERS[holder](pool.take(*SIZE))
    others = [pool.take(*SIZE) for _ in range(4)]
    assert place not in [other.data_ptr() for other in others]
    del held
    gc.collect()
    assert pool.take(*SIZE).data_ptr() == place


@pytest.mark.parametrize("change", ["resized", "shared"])
def test_memory_that_moved_is_let_go(change: str) -> None:
    pool = MapPool()
    map = pool.take(*SIZE)
    map.untyped_storage().resize_(0) if change == "resized" else map.share_memory_()
    moved = map.data_ptr()
    del map
    again = pool.take(*SIZE)
    assert again.data_ptr() not in (0, moved)
    again.fill_(1)


def test_who_keeps_every_map_gets_fresh_memory() -> None:
    pool = MapPool()
    kept = [pool.take(*SIZE) for _ in range(3 * buffers._MOST)]
    assert len({map.data_ptr() for map in kept}) == len(kept)
    assert len(pool._blocks) == buffers._MOST


def test_sizes_that_are_no_longer_wanted_are_let_go() -> None:
    pool = MapPool()
    for side in range(64, 80):
        pool.take(1, 8, side, 8 * side)
    for _ in range(buffers._IDLE):
        pool.take(1, 64, 64, 64)
    pool.take(1, 640, 64, 64)  # something new: time to look what is old
    assert [block.floats for block in pool._blocks] == [640 * 64 * 64, 64 * 64 * 64]


def test_each_thread_has_its_own() -> None:
    pool, places = MapPool(), set()
    places.add(pool.take(*SIZE).data_ptr())
    held: list[Tensor] = []
    thread = threading.Thread(target=lambda: held.append(pool.take(*SIZE)))
    thread.start()
    thread.join()
    assert held[0].data_ptr() not in places


@pytest.mark.parametrize("inference", [False, True])
def test_maps_of_both_modes_share_memory(inference: bool) -> None:
    pool = MapPool()
    with torch.inference_mode(inference):
        place = pool.take(*SIZE).data_ptr()
    with torch.inference_mode(not inference):
        map = pool.take(*SIZE)
    assert map.data_ptr() == place
    assert not map.is_inference()
    assert map._version == 0


def test_without_counts_every_map_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_use_count", None)
    pool = MapPool()
    pool.take(*SIZE)
    assert pool._blocks == []


def packed_model() -> nn.Module:
    torch.manual_seed(0)
    model = binarize(timm.create_model("test_resnet")).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 160, 160))
    return pack(model.eval())


def test_outputs_that_are_kept_keep_their_values() -> None:
    model: Any = packed_model()
    images = torch.randn(6, 1, 3, 160, 160)
    with torch.no_grad():
        kept = [model.forward_intermediates(image, intermediates_only=True) for image in images]
        for image, maps in zip(images, kept, strict=True):
            again = model.forward_intermediates(image, intermediates_only=True)
            assert all(map(torch.equal, maps, again))


def test_the_memory_goes_with_the_last_model() -> None:
    gc.collect()
    model = packed_model()
    with torch.no_grad():
        model(torch.randn(1, 3, 160, 160))
    pool = weakref.ref(shared_pool())
    assert pool()._blocks  # type: ignore[union-attr]
    del model
    gc.collect()
    assert pool() is None
