"""What counts as agreement between a file and the model."""

from __future__ import annotations

import pytest
import torch

from el_convert.agreement import differences, refuse_disagreement
from el_convert.errors import ExportError


def test_differences_are_of_each_image() -> None:
    wanted = [torch.tensor([[1.0, -4.0], [2.0, 0.0]]), torch.full((2, 1, 3), 10.0)]
    given = [wanted[0] + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), wanted[1] + 1]
    assert differences(given, wanted) == pytest.approx([0.25, 0.1])
    for lost in ([], given[:1], [given[0], given[1][:, :, :2]]):
        assert differences(lost, wanted) == [float("inf")] * 2
    given[1][1, 0, 2] = float("nan")
    assert differences(given, wanted) == [0.25, float("inf")]
    anchors = [wanted[0], torch.arange(5.0)]  # no batch: counts for every image
    assert differences([wanted[0], torch.arange(5.0) * 2], anchors) == [1.0, 1.0]
    assert differences([wanted[0][:0]], [wanted[0][:0]]) == []


def test_most_images_must_agree() -> None:
    refuse_disagreement("it", [1e-6, 0.5, 1e-7], 1e-4)
    with pytest.raises(ExportError, match=r"^it differs .* up to 5.0e-01, on 2 of 4 images"):
        refuse_disagreement("it", [0.4, 1e-6, 0.5, 1e-7], 1e-4)
    with pytest.raises(ExportError, match="inf"):
        refuse_disagreement("it", [1e-6, float("inf"), 1e-7], 1e-4)
