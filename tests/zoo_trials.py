"""One model of every class of timm and torchvision, with an input small enough to run it on.

Where a model is too large for a test its constructor is asked for fewer blocks or a smaller image.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from models import seed_norms
from torch import Tensor, nn

from el_convert.recipes import RECIPES, Recipe
from el_convert.zoo import create, find_source

_OURS = ("img_size", "num_classes")  # what a saved file may say of the constructor


@dataclass(frozen=True)
class Trial:
    """How to run one model.

    Attributes:
        name: as `el-convert` takes it.
        side: of the square images, in pixels.
        options: for the constructor.
        task: which inputs it takes: "image", "video", "detection" or "flow".
        frames: of a video.
        batch: number of images or videos.
        stem_only: its only convolution reads the image, which the default recipe keeps.
        graph: the part whose graph is compared, where the model's own forward does not trace.
    """

    name: str
    side: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str = "image"
    frames: int = 16
    batch: int = 2
    stem_only: bool = False
    graph: str = ""

    def build(self) -> nn.Module:
        """The float model, seeded, its norms uneven."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own, on construction
            return seed_norms(self._create())

    def _create(self) -> nn.Module:
        library, _, bare = self.name.partition("/")
        if self.rebuilds:
            return create(find_source(self.name, **self.options))
        if library == "timm":
            import timm

            return cast(nn.Module, timm.create_model(bare, **self.options))
        import torchvision

        return cast(nn.Module, torchvision.models.get_model(bare, weights=None, **self.options))

    @property
    def rebuilds(self) -> bool:
        """Whether a file can say how to build it."""
        return set(self.options) <= set(_OURS)

    def recipe(self, name: str = "elastic-link") -> Recipe:
        """A recipe under which there is something to binarize."""
        chosen = RECIPES[name]
        return chosen.with_options({"keep.image": False}) if self.stem_only else chosen

    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the forward."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        batch, side = self.batch, self.side
        if self.task == "video":
            return (draw(batch, 3, self.frames, side, side),)
        if self.task == "flow":
            return (draw(batch, 3, side, side), draw(batch, 3, side, side))
        if self.task == "detection":
            return ([draw(3, side, side), draw(3, side, side - 16)],)
        return (draw(batch, 3, side, side) * 2 - 1,)

    def training_inputs(self) -> tuple[Any, ...]:
        """The same with the targets that detection models want in training."""
        inputs = self.inputs()
        if self.task != "detection":
            return inputs
        return (*inputs, [_boxes(image) for image in inputs[0]])


def _boxes(image: Tensor) -> dict[str, Tensor]:
    """Two objects, with masks and keypoints for the models that want them."""
    _, height, width = image.shape
    boxes = torch.tensor([[4.0, 4.0, width / 2, height / 2], [8.0, 12.0, width - 4, height - 4]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[:, 8 : height // 2, 8 : width // 2] = 1
    points = torch.tensor([width / 4, height / 4, 1.0]).expand(2, 17, 3).clone()
    labels = torch.tensor([1, 1])
    return {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": points}


EXCLUDED = {
    "Gemma4VitClassifier": "it has no convolution: patches are embedded by a linear layer",
    "Gemma4VitEncoder": "it has no convolution: patches are embedded by a linear layer",
    "NaFlexVit": "it has no convolution: patches are embedded by a linear layer",
}
"""Model classes of timm that no trial is of, with the reason."""

_SMALL = {"img_size": 64}
_DETECTOR = {"weights_backbone": None, "min_size": 96, "max_size": 128}
_TWO_STAGES = {**_DETECTOR, "rpn_post_nms_top_n_train": 40, "box_batch_size_per_image": 16}
TRIALS = (
    Trial("timm/beit_base_patch16_224", options={**_SMALL, "depth": 2}, stem_only=True),
    Trial("timm/test_byobnet"),
    Trial("timm/cait_xxs24_224", options=_SMALL, stem_only=True),
    Trial("timm/coat_tiny", options=_SMALL),
    Trial("timm/convit_tiny", options=_SMALL, stem_only=True),
    Trial("timm/convmixer_768_32"),
    Trial("timm/test_convnext"),
    Trial("timm/cpubone_nano"),
    Trial("timm/crossvit_9_dagger_240", graph="patch_embed.0"),
    Trial("timm/csatv2"),
    Trial("timm/cs3darknet_focus_s"),
    Trial("timm/cspnext_tiny"),
    Trial("timm/davit_tiny"),
    Trial("timm/deepseek_vit_412m", 56, {"depth": 1}, stem_only=True),
    Trial("timm/deepseek_vit_412m_enc", 56, {"depth": 1, "out_features": 64}, stem_only=True),
    Trial("timm/densenet121"),
    Trial("timm/dla46x_c"),
    Trial("timm/dpn48b"),
    Trial("timm/edgenext_xx_small"),
    Trial("timm/efficientformer_l1", 224),
    Trial("timm/efficientformerv2_s0", options=_SMALL),
    Trial("timm/test_efficientnet"),
    Trial("timm/efficientvim_m1"),
    Trial("timm/efficientvim_m1_dist"),
    Trial("timm/efficientvit_b0"),
    Trial("timm/efficientvit_l1"),
    Trial("timm/efficientvit_m0"),
    Trial("timm/vit_tiny_patch16_dinov3_qkvb", stem_only=True),
    Trial("timm/fasternet_t0"),
    Trial("timm/fastvit_t8"),
    Trial("timm/focalnet_tiny_srf"),
    Trial("timm/ghostnet_050"),
    Trial("timm/gcvit_xxtiny", options=_SMALL),
    Trial("timm/hiera_tiny_224", options=_SMALL, stem_only=True),
    Trial("timm/sam2_hiera_tiny", stem_only=True),
    Trial("timm/hgnetv2_b0"),
    Trial("timm/hrnet_w18_small"),
    Trial("timm/iformer_t"),
    Trial("timm/inception_resnet_v2", 96),
    Trial("timm/inception_v3", 96),
    Trial("timm/inception_v4", 96),
    Trial("timm/lcnetv2_small"),
    Trial("timm/levit_256d", options=_SMALL),
    Trial("timm/levit_128s", options=_SMALL),
    Trial("timm/lowformer_b0"),
    Trial("timm/test_mambaout"),
    Trial("timm/test_coatnet", options=_SMALL),
    Trial("timm/poolformerv2_s12"),
    Trial("timm/inception_next_atto"),
    Trial("timm/gmlp_ti16_224", options=_SMALL, stem_only=True),
    Trial("timm/mobilenetv3_small_050"),
    Trial("timm/mobilenetv5_base"),
    Trial("timm/mobilenetv5_300m_enc", options={"channel_multiplier": 0.25}),
    Trial("timm/mvitv2_tiny"),
    Trial("timm/nasnetalarge"),
    Trial("timm/nest_tiny", options=_SMALL),
    Trial("timm/nextvit_small"),
    Trial("timm/test_nfnet"),
    Trial("timm/pnasnet5large"),
    Trial("timm/pit_ti_224", options=_SMALL),
    Trial("timm/pvt_v2_b0"),
    Trial("timm/qwen3_vit_88m", options={"depth": 1}, stem_only=True),
    Trial("timm/qwen3_vit_88m_enc", 64, {"depth": 1}, stem_only=True, graph="patch_embed"),
    Trial("timm/rdnet_tiny"),
    Trial("timm/regnetx_002"),
    Trial("timm/repghostnet_050"),
    Trial("timm/repvit_m1"),
    Trial("timm/test_resnet"),
    Trial("timm/resnetv2_18"),
    Trial("timm/rexnet_100"),
    Trial("timm/selecsls42"),
    Trial("timm/legacy_seresnet18"),
    Trial("timm/sequencer2d_s"),
    Trial("timm/shvit_s1"),
    Trial("timm/starnet_s050"),
    Trial("timm/swiftformer_xs"),
    Trial("timm/swin_tiny_patch4_window7_224", options=_SMALL, stem_only=True),
    Trial("timm/swinv2_tiny_window16_256", options=_SMALL, stem_only=True),
    Trial("timm/swinv2_cr_tiny_224", options=_SMALL, stem_only=True),
    Trial("timm/tiny_vit_5m_224"),
    Trial("timm/tnt_s_legacy_patch16_224", options=_SMALL, stem_only=True),
    Trial("timm/tresnet_m"),
    Trial("timm/twins_svt_small"),
    Trial("timm/vgg11", options={"mlp_ratio": 0.1}),
    Trial("timm/visformer_tiny", options=_SMALL),
    Trial("timm/vit_small_r26_s32_224", options=_SMALL),
    Trial("timm/deit_tiny_distilled_patch16_224", options=_SMALL, stem_only=True),
    Trial("timm/test_vit_relpos", options=_SMALL, stem_only=True),
    Trial("timm/samvit_base_patch16", options={"depth": 2}, graph="neck"),
    Trial("timm/volo_d1_224", options=_SMALL),
    Trial("timm/ese_vovnet19b_slim_dw"),
    Trial("timm/legacy_xception"),
    Trial("timm/xception41p"),
    Trial("timm/xcit_nano_12_p8_224"),
    Trial("torchvision/alexnet"),
    Trial("torchvision/convnext_tiny"),
    Trial("torchvision/deeplabv3_mobilenet_v3_large"),
    Trial("torchvision/densenet121"),
    Trial("torchvision/efficientnet_b0"),
    Trial("torchvision/fcn_resnet50"),
    Trial("torchvision/googlenet"),
    Trial("torchvision/inception_v3", 299),
    Trial("torchvision/lraspp_mobilenet_v3_large"),
    Trial("torchvision/maxvit_t", 224),
    Trial("torchvision/mnasnet0_5"),
    Trial("torchvision/mobilenet_v2"),
    Trial("torchvision/mobilenet_v3_small"),
    Trial("torchvision/mvit_v2_s", 224, {"patch_embed_stride": (8, 28, 28)}, "video"),
    Trial("torchvision/quantized_googlenet"),
    Trial("torchvision/quantized_inception_v3", 299),
    Trial("torchvision/quantized_mobilenet_v2"),
    Trial("torchvision/quantized_mobilenet_v3_large"),
    Trial("torchvision/quantized_resnet18"),
    Trial("torchvision/quantized_shufflenet_v2_x0_5"),
    Trial("torchvision/regnet_y_400mf"),
    Trial("torchvision/resnet18"),
    Trial("torchvision/s3d", 209, task="video", frames=13, batch=1),
    Trial("torchvision/shufflenet_v2_x0_5"),
    Trial("torchvision/squeezenet1_1"),
    Trial("torchvision/swin_t", stem_only=True),
    Trial("torchvision/swin3d_t", task="video", stem_only=True),
    Trial("torchvision/vgg11"),
    Trial("torchvision/mc3_18", task="video", frames=4),
    Trial("torchvision/vit_b_16", 64, {"image_size": 64}, stem_only=True),
    Trial(
        "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
        96,
        _TWO_STAGES,
        "detection",
        graph="backbone",
    ),
    Trial("torchvision/fcos_resnet50_fpn", 96, _DETECTOR, "detection", graph="backbone"),
    Trial("torchvision/keypointrcnn_resnet50_fpn", 96, _TWO_STAGES, "detection", graph="backbone"),
    Trial("torchvision/maskrcnn_resnet50_fpn", 96, _TWO_STAGES, "detection", graph="backbone"),
    Trial("torchvision/retinanet_resnet50_fpn", 96, _DETECTOR, "detection", graph="backbone"),
    Trial("torchvision/ssdlite320_mobilenet_v3_large", 96, task="detection", graph="backbone"),
    Trial("torchvision/raft_small", 128, task="flow", graph="feature_encoder"),
    # Every class of convolution as well:
    Trial("timm/tf_efficientnet_b0"),
    Trial("timm/tf_efficientnet_cc_b0_4e"),
    Trial("timm/tf_mixnet_s"),
    Trial("timm/resnetv2_50x1_bit"),
    Trial("timm/dm_nfnet_f0"),
    Trial("torchvision/r2plus1d_18", task="video", frames=4),
)
