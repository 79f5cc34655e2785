"""torchvision models that are no plain classifiers, with inputs and losses that fit them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from models import seed_norms
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model

CLASSES = 4
IMAGE_SIZES = ((64, 96), (72, 80))  # two, as detectors take


@dataclass(frozen=True)
class Task:
    """A torchvision model and what it needs to run.

    `shape` is the smallest input that works, unused by detectors; `predictions` are globs on the
    convolutions whose results are the answer. `slow` are those that take long, or whose layers
    another task covers.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    predictions: tuple[str, ...] = ()
    slow: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        options = {"weights": None, **self.options}
        if self.kind in ("detection", "segmentation"):
            options["weights_backbone"] = None
        return seed_norms(get_model(self.name, **options))

    def arguments(self, train: bool) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(1)
        if self.kind == "detection":
            images = [torch.rand(3, *size, generator=generator) for size in IMAGE_SIZES]
            targets = [_target(*size, generator) for size in IMAGE_SIZES]
            return (images, targets) if train else (images,)
        if self.kind == "flow":
            frames = torch.rand(2, *self.shape, generator=generator) * 2 - 1
            return frames[0], frames[1], 2  # updates of the flow
        return (torch.randn(self.shape, generator=generator),)

    def loss(self, output: Any) -> Tensor:
        return torch.stack([self._loss(part) for part in leaves(output).values()]).sum()

    def _loss(self, part: Tensor) -> Tensor:
        if self.kind == "detection":
            return part  # detectors return losses
        generator = torch.Generator().manual_seed(2)
        if self.kind == "flow":
            return F.l1_loss(part, torch.randn(part.shape, generator=generator))
        shape = (part.shape[0], *part.shape[2:])
        return F.cross_entropy(part, torch.randint(part.shape[1], shape, generator=generator))


def _target(height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Two objects with all that any detector asks for."""
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [10.0, 20.0, 30.0, 60.0]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    points = corner + size * torch.rand(2, 17, 2, generator=generator)
    keypoints = torch.cat([points, torch.ones(2, 17, 1)], dim=2)
    labels = torch.tensor([1, CLASSES - 1])
    return {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}


def leaves(output: Any) -> dict[str, Tensor]:
    """The tensors of nested dicts, lists and tuples, by where they are."""
    return dict(_walk(output, ""))


def _walk(output: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield path, output
        return
    assert isinstance(output, (Mapping, list, tuple)), f"{path} is {type(output).__name__}"
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    for key, value in items:
        yield from _walk(value, f"{path}/{key}")


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether the same places, in the same order, hold the same bits."""
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def all_finite(parts: Mapping[str, Tensor]) -> bool:
    return bool(parts) and all(bool(part.isfinite().all()) for part in parts.values())


def check_detections(found: Mapping[str, Tensor]) -> None:
    """Something was found in each image, and lies in it."""
    for index, (height, width) in enumerate(IMAGE_SIZES):
        here = {path.split("/")[2]: v for path, v in found.items() if path.startswith(f"/{index}/")}
        count = len(here["boxes"])
        assert count > 0
        assert all(len(part) == count for part in here.values())
        assert (here["boxes"] >= 0).all()
        assert (here["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert ((here["labels"] >= 0) & (here["labels"] < CLASSES)).all()
        for name in {"scores", "masks"} & set(here):
            assert ((here[name] >= 0) & (here[name] <= 1)).all()
        assert "masks" not in here or here["masks"].shape == (count, 1, height, width)
        assert "keypoints" not in here or here["keypoints"].shape == (count, 17, 3)


def infer(task: Task, network: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    network.eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        return leaves(network(*task.arguments(train=False)))


def settle(task: Task, network: nn.Module) -> nn.Module:
    """Give batch norms the statistics of the task's own input, as training would.

    Without it values grow from layer to layer in eval mode, and detectors find nothing.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    torch.manual_seed(3)
    with torch.no_grad():
        network.train()(*task.arguments(train=True))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network


@contextmanager
def small_images(network: nn.Module) -> Iterator[None]:
    """Let a detector scale images to 64 pixels for a while, not to 800; others are left alone."""
    transform: Any = getattr(network, "transform", None)

    if transform is not None:
        before = transform.min_size, transform.max_size
        transform.min_size, transform.max_size = (64,), 96
    yield
    if transform is not None:
        transform.min_size, transform.max_size = before


@dataclass(frozen=True)
class Step:
    """What one training step of a copy gave."""

    outputs: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def train_step(task: Task, network: nn.Module) -> Step:
    trial = copy.deepcopy(network).train()
    torch.manual_seed(3)
    output = trial(*task.arguments(train=True))
    loss = task.loss(output)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in trial.named_parameters() if p.grad is not None}
    outputs = {path: part.detach() for path, part in leaves(output).items()}
    return Step(outputs, loss.detach(), gradients, dict(trial.named_buffers()))


# Few proposals, and no threshold on scores: untrained detectors are sure of nothing.
_TWO_STAGES = {
    "num_classes": CLASSES,
    "min_size": 64,
    "max_size": 96,
    "rpn_post_nms_top_n_train": 32,
    "rpn_post_nms_top_n_test": 16,
    "rpn_score_thresh": -1.0,
    "box_batch_size_per_image": 4,
    "box_detections_per_img": 2,
    "box_score_thresh": -1.0,
}
_SSD = {"num_classes": CLASSES, "detections_per_img": 4, "score_thresh": -1.0}
_ONE_STAGE = {**_SSD, "min_size": 64, "max_size": 96, "topk_candidates": 50}
_RPN = ("rpn.head.cls_logits", "rpn.head.bbox_pred")
_SINGLE = "head.classification_head.cls_logits", "head.regression_head.bbox_reg"
_AUX = {"num_classes": CLASSES, "aux_loss": True}
_LAST = ("classifier.4", "aux_classifier.4")
_FOUR = {"num_classes": CLASSES}
_INIT = {**_FOUR, "init_weights": True}  # the default, said aloud: else they warn
_MAP, _CLIP, _PAIR = (2, 3, 64, 64), (2, 3, 4, 32, 32), (1, 3, 128, 128)
# The registered MViTs take nothing but 16 frames of 224 x 224; large patches make them cheap.
_FEW_TOKENS = {**_FOUR, "patch_embed_stride": (8, 28, 28)}

TASKS = (
    Task("fasterrcnn_mobilenet_v3_large_320_fpn", "detection", (), _TWO_STAGES, _RPN),
    Task(
        "keypointrcnn_resnet50_fpn",
        "detection",
        (),
        _TWO_STAGES,
        (*_RPN, "roi_heads.keypoint_predictor.kps_score_lowres"),
    ),
    Task(
        "maskrcnn_resnet50_fpn",
        "detection",
        (),
        _TWO_STAGES,
        (*_RPN, "roi_heads.mask_predictor.mask_fcn_logits"),
    ),
    Task(
        "fcos_resnet50_fpn",
        "detection",
        (),
        _ONE_STAGE,
        (*_SINGLE, "head.regression_head.bbox_ctrness"),
    ),
    Task("retinanet_resnet50_fpn", "detection", (), _ONE_STAGE, _SINGLE),
    Task("ssdlite320_mobilenet_v3_large", "detection", (), _SSD, ("head.*_head.module_list.?.1",)),
    Task("ssd300_vgg16", "detection", (), _SSD, ("head.*_head.module_list.?",), slow=True),
    Task("deeplabv3_mobilenet_v3_large", "segmentation", _MAP, _AUX, _LAST),
    Task("fcn_resnet50", "segmentation", _MAP, _AUX, _LAST),
    Task(
        "lraspp_mobilenet_v3_large",
        "segmentation",
        _MAP,
        _FOUR,
        ("classifier.low_classifier", "classifier.high_classifier"),
    ),
    Task("r3d_18", "video", _CLIP, _FOUR, slow=True),
    Task("mc3_18", "video", _CLIP, _FOUR),
    Task("r2plus1d_18", "video", _CLIP, _FOUR),
    Task("s3d", "video", (1, 3, 13, 209, 209), _FOUR, ("classifier.1",), slow=True),
    Task("mvit_v1_b", "video", (1, 3, 16, 224, 224), _FEW_TOKENS, slow=True),
    Task("mvit_v2_s", "video", (1, 3, 16, 224, 224), _FEW_TOKENS),
    Task("raft_small", "flow", _PAIR, {}, ("update_block.flow_head.conv2",)),
    Task(
        "raft_large",
        "flow",
        _PAIR,
        {},
        ("update_block.flow_head.conv2", "mask_predictor.conv"),
    ),
    Task("quantized_googlenet", "quantizable", _MAP, _INIT),
    Task("quantized_inception_v3", "quantizable", (2, 3, 299, 299), _INIT, slow=True),
    Task("quantized_mobilenet_v2", "quantizable", _MAP, _FOUR),
    Task("quantized_mobilenet_v3_large", "quantizable", _MAP, _FOUR),
    Task("quantized_resnet18", "quantizable", _MAP, _FOUR),
    Task("quantized_shufflenet_v2_x0_5", "quantizable", _MAP, _FOUR),
)
BY_NAME = {task.name: task for task in TASKS}
