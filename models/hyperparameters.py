"""Hyper-parameters of every method as frozen dataclasses, each field with its help line, and the names of backbones.

Nothing here imports PyTorch: a command line is checked, and `--help` printed, before the seconds that PyTorch takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .options import option

ConvInit = Literal["fan_out", "fan_in", "torch"]
HeadInit = Literal["torch", "fan_in"]
MomentumNorm = Literal["own", "ema"]
Position = Literal["absolute", "relative", "sincos", "none"]
AttentionLoss = Literal["mse_mean", "l2norm"]
Negatives = Literal["all_maps", "same_map"]
SameImage = Literal["ignored", "negatives"]
Grouping = Literal["contiguous", "interleaved"]


@dataclass(frozen=True)
class RegionConfig:
    """Region swapping and its losses; the ablations of RegionCL's Tables 9 and 10 are `lower`, `upper` and `use_*`."""

    lower: int = option(0, "smallest side of a region in cells (C_L); 0 is round(3n/7) on an n x n map")
    upper: int = option(0, "largest side of a region in cells (C_U); 0 is round(5n/7) on an n x n map")
    sampling: Literal["paper", "official"] = option(
        "paper", "paper: origins uniform on the grid; official: the released code's, clamped one pixel short"
    )
    pairing: Literal["flip", "roll", "randperm"] = option("flip", "whose region an image gets: flip is reversal")
    pairing_scope: Literal["group", "global"] = option(
        "group", "pair within groups that share batch-norm statistics, or over the global batch"
    )
    per_rank: bool = option(False, "a region for each rank; the result then depends on the number of ranks")
    use_paste: bool = option(True, "contrast the pasted region with its own image")
    use_canvas: bool = option(True, "contrast the remaining canvas with its own image")
    intra_negative: bool = option(True, "paste and canvas of one composite are negatives of each other")
    weight: float = option(
        1.0, "weight of the region loss, of which canvas and paste have half each; 2 gives one that is alone all of it"
    )
    views: Literal["both", "first"] = option("both", "which query views are region-swapped, where both are queries")
    shared_forward: bool | None = option(
        None,
        "encode view and composites in one pass, batch statistics stay apart; none: where --kernels proves it faster",
        free_on_resume=True,
    )
    head_batching: Literal["joint", "separate"] = option(
        "joint", "instance and region features pass the heads (and their batch norm) together or apart"
    )

    @property
    def enabled(self) -> bool:
        """Whether there is a region loss at all."""
        return self.use_paste or self.use_canvas

    @property
    def needs_paste(self) -> bool:
        """Whether the paste must be embedded, for its own term or as the canvas' negative."""
        return self.use_paste or (self.use_canvas and self.intra_negative)

    @property
    def needs_canvas(self) -> bool:
        """Whether the canvas must be embedded, for its own term or as the paste's negative."""
        return self.use_canvas or (self.use_paste and self.intra_negative)

    def mixed_views(self, query_views: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the query views that are region-swapped."""
        if not self.enabled:
            return ()
        return query_views if self.views == "both" else query_views[:1]


@dataclass(frozen=True)
class SymmetricConfig:
    """Whether each view acts as query and as key in turn."""

    enabled: bool = option(False, "use both views as queries")
    reduce: Literal["sum", "mean"] = option("sum", "how the losses of the two directions are joined")
    enqueue: Literal["both", "first"] = option(
        "both", "whose keys enter the queue: those of both directions, or of the first, where view 1 asks, alone"
    )


@dataclass(frozen=True)
class MoCoV2Config:
    """Hyper-parameters of MoCo v2."""

    symmetric: SymmetricConfig = field(default_factory=SymmetricConfig)
    queue_size: int = option(65536, "keys kept as negatives (K)", above=0)
    temperature: float = option(0.2, "softmax temperature (tau)", above=0)
    dim: int = option(128, "width of the embeddings", above=0)
    hidden_dim: int = option(2048, "width of the projector's hidden layer", above=0)
    mlp: bool = option(True, "two-layer projector; false is MoCo v1's single linear layer")
    extra_head: bool = option(
        False, "moco-v2 alone: a second projector with a queue and a loss of its own, each loss with half the weight"
    )
    shuffle_bn: bool = option(True, "compute keys in shuffled order, away from their queries' batch-norm groups")
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    head_init: HeadInit = option("torch", "how the projector starts: as in PyTorch or Kaiming-normal")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class UnMixConfig(MoCoV2Config):
    """Hyper-parameters of Un-Mix on MoCo v2."""

    beta: float = option(1.0, "both parameters of the beta distribution of an image's share in a mixture", above=0)
    global_mixtures: float = option(
        0.5,
        "how often whole images are mixed in proportion, and not a box of one pasted into the other",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class RegionCLMConfig(MoCoV2Config):
    """Hyper-parameters of RegionCL-M."""

    conv_init: ConvInit = option("fan_in", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    head_init: HeadInit = option("fan_in", "how the projector starts: as in PyTorch or Kaiming-normal")
    region: RegionConfig = field(default_factory=RegionConfig)


@dataclass(frozen=True)
class DenseCLConfig(MoCoV2Config):
    """Hyper-parameters of DenseCL."""

    conv_init: ConvInit = option("fan_in", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    head_init: HeadInit = option("fan_in", "how the global projector starts: as in PyTorch or Kaiming-normal")
    dense_weight: float = option(0.5, "share of the dense loss (lambda); the global loss has the rest")
    dense_warmup_steps: int = option(0, "optimizer steps at the start with the global loss alone")


@dataclass(frozen=True)
class RegionCLDConfig(DenseCLConfig):
    """Hyper-parameters of RegionCL-D."""

    region: RegionConfig = field(default_factory=RegionConfig)


@dataclass(frozen=True)
class SimSiamConfig:
    """Hyper-parameters of SimSiam."""

    dim: int = option(2048, "width of the projections and predictions", above=0)
    hidden_dim: int = option(2048, "width of the projector's hidden layers", above=0)
    predictor_hidden_dim: int = option(512, "width of the predictor's hidden layer", above=0)
    fixed_predictor_lr: bool = option(True, "keep the predictor's learning rate constant")
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(True, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class RegionCLSConfig(SimSiamConfig):
    """Hyper-parameters of RegionCL-S."""

    region: RegionConfig = field(default_factory=lambda: RegionConfig(intra_negative=False))


@dataclass(frozen=True)
class ByolConfig:
    """Hyper-parameters of BYOL."""

    hidden_dim: int = option(4096, "width of the hidden layer of projector and predictor", above=0)
    dim: int = option(256, "width of the embeddings", above=0)
    head_bias: bool = option(False, "biases in the linear layers of projector and predictor")
    momentum_norm: MomentumNorm = option(
        "own", "batch norm of the momentum network: own batch statistics, or ema: the online ones averaged (EMAN)"
    )
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class CareConfig:
    """Hyper-parameters of CARE."""

    design: Literal["parallel", "sequential", "conv"] = option(
        "parallel",
        "two streams side by side; the CNN followed by the attention blocks and one head; or the CNN stream alone",
    )
    t_input: Literal["layer3", "layer4"] = option(
        "layer3",
        "stage that feeds the transformer stream: beside layer4 (the code), or the last one (the paper's text)",
    )
    n_blocks: int = option(5, "attention blocks (n)", above=0)
    heads: int = option(4, "attention heads", above=0)
    pos: Position = option(
        "relative", "position encoding of the attention blocks; the released code has absolute, its Table 8 both"
    )
    lambda_att: float = option(100.0, "weight of the attention loss (lambda)")
    att_loss: AttentionLoss = option(
        "mse_mean",
        "attention loss: mean squared error over all elements (the code), or length of the difference (Eq. 4)",
    )
    att_teacher_terms: bool = option(
        True, "add the momentum network's attention loss, a constant, to the reported value"
    )
    t_zero_init: bool = option(False, "start the last batch norm of each attention block at gamma 0")
    t_bn_group_size: int = option(
        128, "images that share batch-norm statistics in the transformer stream; 0 is the rank's whole batch"
    )
    hidden_dim: int = option(4096, "width of the hidden layer of projectors and predictors", above=0)
    dim: int = option(256, "width of the embeddings", above=0)
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class AlignedConfig:
    """Negatives of the aligned loss."""

    negatives: Negatives = option(
        "all_maps", "aligned embeddings of other images: all of them, or those of the same map"
    )
    same_image: SameImage = option(
        "ignored", "other maps of the query's own image: neither positive nor negative, or negatives as well"
    )
    gather: bool = option(True, "take negatives from the images of all devices; false: from this device's batch")


@dataclass(frozen=True)
class LewelMConfig:
    """Hyper-parameters of LEWEL-M."""

    aligned: AlignedConfig = field(default_factory=AlignedConfig)
    queue_size: int = option(65536, "global keys kept as negatives (K)", above=0)
    temperature: float = option(0.2, "softmax temperature (tau) of both losses", above=0)
    hidden_dim: int = option(2048, "width of the projectors' hidden layers", above=0)
    dim: int = option(128, "width of the global embedding (d); there are d / h maps", above=0)
    c: int = option(0, "width of an aligned embedding; 0: that of the projector's output, the paper's d = c", least=0)
    h: int = option(4, "channel groups, each pooled by maps of its own", above=0)
    beta: float = option(0.5, "weight of the aligned loss; the global loss has 1 - beta")
    coupled: bool = option(True, "the global projector also makes the maps; false gives them a head of their own")
    global_loss: bool = option(True, "train the global embedding; alone it has weight 1")
    aligned_loss: bool = option(True, "train the aligned embeddings; alone they have weight 1")
    align: Literal["learned", "random"] = option("learned", "learned maps, or random ones drawn anew each step")
    grouping: Grouping = option("contiguous", "maps of a channel group: neighbours (the code), or every h-th (Eq. 2)")
    shuffle_bn: bool = option(True, "compute keys in shuffled order, away from their queries' batch-norm groups")
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class LewelBConfig:
    """Hyper-parameters of LEWEL-B."""

    hidden_dim: int = option(4096, "width of the hidden layers of projectors and predictors", above=0)
    dim: int = option(256, "width of the projector's output (d); there are d / h maps", above=0)
    c: int = option(0, "width of an aligned embedding; 0: that of the projector's output, the paper's d = c", least=0)
    h: int = option(4, "channel groups, each pooled by maps of its own", above=0)
    beta: float = option(0.5, "weight of the aligned loss; the global loss has 1 - beta (the paper's meaning)")
    coupled: bool = option(True, "the global projector also makes the maps; false gives them a head of their own")
    global_loss: bool = option(True, "train the global embedding; alone it has weight 1")
    aligned_loss: bool = option(True, "train the aligned embeddings; alone they have weight 1")
    align: Literal["learned", "random"] = option("learned", "learned maps, or random ones drawn anew each step")
    grouping: Grouping = option("contiguous", "maps of a channel group: neighbours (the code), or every h-th (Eq. 2)")
    momentum_norm: MomentumNorm = option(
        "ema", "batch norm of the momentum network: own batch statistics, or ema: the online ones averaged (EMAN)"
    )
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class MoCoV3Config:
    """Hyper-parameters of MoCo v3."""

    temperature: float = option(1.0, "softmax temperature (tau)", above=0)
    dim: int = option(256, "width of the embeddings", above=0)
    hidden_dim: int = option(4096, "width of the hidden layers of projector and predictor", above=0)
    projector_layers: int = option(2, "linear layers of the projector: 2 on a ResNet, 3 on a ViT", least=2)
    predictor_norm: bool = option(False, "batch norm on the predictor's output, as on a ViT")
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(True, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class RegionCLM3Config(MoCoV3Config):
    """Hyper-parameters of RegionCL-M3."""

    region: RegionConfig = field(default_factory=RegionConfig)


@dataclass(frozen=True)
class MoBYConfig:
    """Hyper-parameters of MoBY."""

    queue_size: int = option(4096, "keys kept as negatives in each of the two queues (K)", above=0)
    temperature: float = option(0.2, "softmax temperature (tau)", above=0)
    dim: int = option(256, "width of the embeddings", above=0)
    hidden_dim: int = option(4096, "width of the hidden layers of projector and predictor", above=0)
    drop_path: float = option(0.2, "drop rate of the online network's last residual branch; 0 for a ResNet")
    conv_init: ConvInit = option("torch", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class RegionCLMoBYConfig(MoBYConfig):
    """Hyper-parameters of RegionCL on MoBY."""

    region: RegionConfig = field(default_factory=RegionConfig)


@dataclass(frozen=True)
class SimCLRConfig:
    """Hyper-parameters of SimCLR."""

    temperature: float = option(0.1, "softmax temperature (tau)", above=0)
    dim: int = option(128, "width of the embeddings", above=0)
    hidden_dim: int = option(2048, "width of the projector's hidden layers", above=0)
    projector_layers: int = option(
        2, "linear layers of the projector: 2, or 3 as the SimSiam paper repeats it", least=2
    )
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(True, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class BarlowTwinsConfig:
    """Hyper-parameters of Barlow Twins."""

    off_diagonal_weight: float = option(0.0051, "weight of the redundancy term (lambda)", least=0)
    loss_scale: float = option(
        1 / 16, "factor of the loss; the released code's gradient is that of its 16 devices together divided by 16"
    )
    dim: int = option(8192, "width of the embeddings", above=0)
    hidden_dim: int = option(8192, "width of the projector's two hidden layers", above=0)
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(True, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class SwAVConfig:
    """Hyper-parameters of SwAV."""

    small_crops: int = option(6, "small crops of each image beside the two large ones", least=0)
    small_size: int = option(96, "side of a small crop in pixels", least=8)
    small_scale: tuple[float, float] = option(
        (0.05, 0.14), "smallest and largest area of a small crop relative to the image's", above=0, most=1
    )
    prototypes: int = option(3000, "prototypes (K)", above=0)
    freeze_prototypes_steps: int = option(313, "optimizer steps at the start that leave the prototypes alone", least=0)
    temperature: float = option(0.1, "softmax temperature (tau) of the predictions", above=0)
    sinkhorn_epsilon: float = option(
        0.05, "entropy of the assignments (epsilon); below 0.02 its exponentials would leave fp32", least=0.02
    )
    sinkhorn_iterations: int = option(3, "iterations of Sinkhorn-Knopp", least=1)
    queue_size: int = option(
        0, "embeddings of earlier steps that take part in the assignments, for small batches; 0: none", least=0
    )
    queue_start_epoch: int = option(15, "epoch, from 0, in which the queue begins to fill", least=0)
    dim: int = option(128, "width of the embeddings", above=0)
    hidden_dim: int = option(2048, "width of the projector's hidden layers", above=0)
    projector_layers: int = option(
        2, "linear layers of the projector: 2, or 3 as the SimSiam paper repeats it", least=2
    )
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(False, "start every residual branch of a ResNet at zero")


@dataclass(frozen=True)
class PixProConfig:
    """Hyper-parameters of PixPro."""

    reach: float = option(
        0.7,
        "largest distance of a positive pair of cells in the image, in diagonals of the larger of their cells (T)",
        above=0,
    )
    distance: Literal["sides", "pixels"] = option(
        "sides", "in what distances are measured: shares of the image's two sides (the code), or its pixels"
    )
    sharpness: float = option(2.0, "power of the similarity that cells are propagated with (gamma)", above=0)
    transform_layers: int = option(
        1, "1x1 convolutions of what is propagated, batch norm and ReLU between two", least=0, most=2
    )
    unit_values: bool = option(
        True, "bring what is propagated to unit length first (the code), or propagate it as it is (Eq. 3)"
    )
    loss_scale: float = option(2.0, "factor of the loss: 2 in the released code, 1 in Eq. 5", above=0)
    instance_weight: float = option(
        0.0,
        "weight of a second branch that compares whole images; 0, as in the released recipes: no such branch",
        least=0,
    )
    hidden_dim: int = option(4096, "width of the projector's hidden layer", above=0)
    dim: int = option(256, "width of the embeddings", above=0)
    conv_init: ConvInit = option("fan_out", "how the backbone's convolutions start: Kaiming-normal or as in PyTorch")
    zero_init_residual: bool = option(True, "start every residual branch of a ResNet at zero")


CONFIGS: dict[str, type[Any]] = {
    "moco-v2": MoCoV2Config,
    "regioncl-m": RegionCLMConfig,
    "densecl": DenseCLConfig,
    "regioncl-d": RegionCLDConfig,
    "simsiam": SimSiamConfig,
    "regioncl-s": RegionCLSConfig,
    "byol": ByolConfig,
    "care": CareConfig,
    "lewel-m": LewelMConfig,
    "lewel-b": LewelBConfig,
    "moco-v3": MoCoV3Config,
    "regioncl-m3": RegionCLM3Config,
    "moby": MoBYConfig,
    "regioncl-moby": RegionCLMoBYConfig,
    "unmix": UnMixConfig,
    "simclr": SimCLRConfig,
    "barlow-twins": BarlowTwinsConfig,
    "swav": SwAVConfig,
    "pixpro": PixProConfig,
}
"""The methods by name, with their hyper-parameters; `models.methods.METHODS` has the networks under the same names."""

ARCHITECTURES = (
    "resnet10-w16",
    "resnet10-w32",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet50-2x",
    "swin-t",
    "vit-s",
    "vit-b",
)
"""The names of our own backbones, which `models.resnet.BACKBONES` builds."""
