"""Public model classes of every family, small or with random weights, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 6
WORDS = 100
Inputs = Any
Inputting = Callable[[int, torch.Generator], Inputs]


@dataclass(frozen=True)
class Entry:
    """One model class.

    Attributes:
        name: Of the class or configuration.
        library: torchvision, timm, transformers or torch.
        family: What kind of network it is.
        make: Makes one with random weights.
        inputs: `(n, generator)` ↦ n inputs in the form that it takes.
        heavy: Whether it takes long.
        options: Of `ELLA`.
        classes: c.
    """

    name: str
    library: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Inputting
    heavy: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    classes: int = CLASSES


def images(size: int = 32, channels: int = 3, dtype: torch.dtype = torch.float32) -> Inputting:
    """Images (n, channels, size, size)."""
    return lambda n, g: torch.randn(n, channels, size, size, generator=g).to(dtype)


def clips(frames: int, size: int) -> Inputting:
    """Videos (n, 3, frames, size, size)."""
    return lambda n, g: torch.randn(n, 3, frames, size, size, generator=g)


def waves(length: int, name: str = "input_values") -> Inputting:
    """Sounds (n, length) in a mapping."""
    return lambda n, g: {name: torch.randn(n, length, generator=g)}


def texts(longest: int = 12, *, mask: bool = True) -> Inputting:
    """Token ids (n, length), each batch as long as its longest text; 1 is padding."""

    def made(n: int, g: torch.Generator) -> dict[str, Tensor]:
        lengths = torch.randint(4, longest + 1, (n,), generator=g)
        ids = torch.randint(3, WORDS, (n, int(lengths.max())), generator=g)
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        ids[:, 0], ids[~real] = 0, 1
        ids[torch.arange(n), lengths - 1] = 2
        return {"input_ids": ids, "attention_mask": real.long()} if mask else {"input_ids": ids}

    return made


def torchvision_entries() -> list[Entry]:
    """Image and video networks of torchvision."""
    import torchvision.models as tv

    def one(
        name: str, family: str, inputs: Inputting, *, heavy: bool = False, **o: object
    ) -> Entry:
        options = {"weights": None, "num_classes": CLASSES, **o}
        make = lambda: getattr(tv, name)(**options)  # noqa: E731
        return Entry(name, "torchvision", family, make, inputs, heavy)

    video = lambda name: getattr(tv.video, name)(weights=None, num_classes=CLASSES)  # noqa: E731
    quiet = {"aux_logits": False, "init_weights": False}
    return [
        one("resnet18", "residual", images(), heavy=True),
        one("resnext50_32x4d", "residual", images(), heavy=True),
        one("wide_resnet50_2", "residual", images(), heavy=True),
        one("densenet121", "dense", images(), heavy=True),
        one("mobilenet_v2", "mobile", images()),
        one("mobilenet_v3_small", "mobile, squeeze-and-excitation", images()),
        one("efficientnet_b0", "mobile, squeeze-and-excitation", images(), heavy=True),
        one("efficientnet_v2_s", "mobile, squeeze-and-excitation", images(), heavy=True),
        one("mnasnet0_5", "mobile", images()),
        one("shufflenet_v2_x0_5", "channel shuffle", images()),
        one("squeezenet1_1", "squeeze", images(64)),
        one("regnet_y_400mf", "residual, squeeze-and-excitation", images()),
        one("googlenet", "inception", images(64), **quiet),
        one(
            "inception_v3", "inception, auxiliary head", images(96), heavy=True, init_weights=False
        ),
        one("alexnet", "plain convolution", images(64), heavy=True),
        one("vgg11_bn", "plain convolution", images(32), heavy=True),
        one("convnext_tiny", "ConvNeXt", images(), heavy=True),
        one("vit_b_16", "vision transformer", images(32), heavy=True, image_size=32),
        one("swin_t", "windowed transformer", images(), heavy=True),
        one("swin_v2_t", "windowed transformer", images(64), heavy=True),
        one("maxvit_t", "windowed transformer", images(224), heavy=True),
        Entry("r3d_18", "torchvision", "video", lambda: video("r3d_18"), clips(4, 32), True),
        Entry("mc3_18", "torchvision", "video", lambda: video("mc3_18"), clips(4, 32), True),
        Entry(
            "r2plus1d_18", "torchvision", "video", lambda: video("r2plus1d_18"), clips(4, 24), True
        ),
        Entry("s3d", "torchvision", "video", lambda: video("s3d"), clips(16, 224), True),
    ]


TIMM = {
    "resnet10t": ("residual", 32, {}),
    "resnetv2_50": ("residual, pre-activation", 32, {}),
    "ecaresnet26t": ("residual, channel attention", 32, {}),
    "skresnet18": ("residual, selective kernels", 32, {}),
    "resnest14d": ("residual, split attention", 32, {}),
    "res2net50_26w_4s": ("residual, scales", 32, {}),
    "dla34": ("aggregation", 32, {}),
    "hrnet_w18_small": ("several resolutions", 32, {}),
    "ghostnet_050": ("mobile", 32, {}),
    "tinynet_e": ("mobile", 32, {}),
    "lcnet_050": ("mobile", 32, {}),
    "repvgg_a0": ("reparametrized", 32, {}),
    "mobileone_s0": ("reparametrized", 32, {}),
    "fastvit_t8": ("hybrid", 64, {}),
    "convmixer_768_32": ("mixer", 32, {}),
    "mixer_s32_224": ("mixer", 32, {"img_size": 32}),
    "gmlp_s16_224": ("mixer", 32, {"img_size": 32}),
    "vit_tiny_patch16_224": ("vision transformer", 32, {"img_size": 32, "depth": 3}),
    "deit_tiny_distilled_patch16_224": (
        "vision transformer, distilled",
        32,
        {"img_size": 32, "depth": 3},
    ),
    "vit_tiny_r_s16_p8_224": ("hybrid", 32, {"img_size": 32, "depth": 2}),
    "cait_xxs24_224": ("vision transformer", 32, {"img_size": 32, "depth": 2}),
    "beit_base_patch16_224": (
        "vision transformer",
        32,
        {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4},
    ),
    "xcit_nano_12_p8_224": ("cross-covariance attention", 32, {"img_size": 32, "depth": 2}),
    "crossvit_tiny_240": ("vision transformer, two scales", 240, {}),
    "pit_ti_224": ("pooling transformer", 32, {"img_size": 32}),
    "levit_128s": ("hybrid", 64, {"img_size": 64}),
    "convit_tiny": ("vision transformer, gated", 32, {"img_size": 32, "depth": 3}),
    "tnt_s_legacy_patch16_224": ("transformer in transformer", 32, {"img_size": 32, "depth": 2}),
    "pvt_v2_b0": ("pyramid transformer", 32, {}),
    "twins_pcpvt_small": ("pyramid transformer", 64, {"img_size": 64}),
    "poolformer_s12": ("MetaFormer", 32, {}),
    "caformer_s18": ("MetaFormer", 32, {}),
    "edgenext_xx_small": ("hybrid", 32, {}),
    "mobilevit_xxs": ("hybrid, patches folded into the batch", 64, {}),
    "mobilevitv2_050": ("hybrid, patches folded into the batch", 64, {}),
    "coat_tiny": ("co-scale transformer", 64, {"img_size": 64}),
    "nest_tiny": ("nested transformer, blocks", 32, {"img_size": 32}),
    "visformer_tiny": ("hybrid", 32, {"img_size": 32}),
    "volo_d1_224": ("outlook attention", 32, {"img_size": 32}),
    "efficientformer_l1": ("hybrid", 224, {}),
    "nfnet_l0": ("normalizer-free, weight standardisation", 32, {}),
    "swin_tiny_patch4_window7_224": ("windowed transformer", 64, {"img_size": 64}),
    "focalnet_tiny_srf": ("focal modulation", 32, {}),
    "inception_next_atto": ("inception", 32, {}),
    "starnet_s1": ("star operation", 32, {}),
    "davit_tiny": ("windowed transformer, channels", 32, {}),
    "eva02_tiny_patch14_224": ("rotary positions", 28, {"img_size": 28, "depth": 2}),
}
LIGHT_TIMM = (
    *("ghostnet_050", "tinynet_e", "lcnet_050"),
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("beit_base_patch16_224", "xcit_nano_12_p8_224", "convit_tiny", "mobilevitv2_050"),
    *("eva02_tiny_patch14_224", "starnet_s1"),
)


def timm_entries() -> list[Entry]:
    """Image networks of timm."""
    import timm

    def one(name: str) -> Entry:
        family, size, options = TIMM[name]

        def make() -> nn.Module:
            return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

        return Entry(name, "timm", family, make, images(size), name not in LIGHT_TIMM)

    return [one(name) for name in TIMM]


SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_labels": CLASSES,
}
UNLIMITED = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
DECODER = {**SMALL, "num_key_value_heads": 2}
TINY_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}
AUDIO = {
    **UNLIMITED,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
TEXT = "ForSequenceClassification"
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("encoder", SMALL),
    "Roberta": ("encoder", SMALL),
    "DistilBert": ("encoder", {**SMALL, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}),
    "Albert": ("encoder, tied layers", {**SMALL, "embedding_size": 16}),
    "Electra": ("encoder", {**SMALL, "embedding_size": 16}),
    "DebertaV2": (
        "encoder, disentangled attention",
        {
            **SMALL,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
        },
    ),
    "MobileBert": (
        "encoder, bottlenecks",
        {**SMALL, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "SqueezeBert": ("encoder, grouped convolutions", {**SMALL, "embedding_size": 32}),
    "ConvBert": ("encoder, convolutions", {**SMALL, "embedding_size": 32}),
    "RoFormer": ("encoder, rotary positions", {**SMALL, "embedding_size": 32}),
    "FNet": ("encoder, Fourier", SMALL),
    "Longformer": ("encoder, windows", {**SMALL, "attention_window": 8}),
    "BigBird": ("encoder, blocks", {**SMALL, "attention_type": "original_full"}),
    "Funnel": (
        "encoder, pooling",
        {
            **{key: SMALL[key] for key in ("vocab_size", "pad_token_id", "num_labels")},
            "d_model": 32,
            "n_head": 2,
            "d_head": 16,
            "d_inner": 48,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
    ),
    "XLNet": (
        "permuted, length first",
        {**UNLIMITED, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
    ),
    "GPT2": ("decoder", {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "GPTNeoX": ("decoder, rotary positions", SMALL),
    "Llama": ("decoder, rotary positions", DECODER),
    "Mistral": ("decoder, sliding window", DECODER),
    "Qwen2": ("decoder", DECODER),
    "OPT": ("decoder", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": ("decoder, ALiBi", {**SMALL, "n_layer": 2, "n_head": 2}),
    "Bart": (
        "encoder and decoder",
        {
            **SMALL,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
        },
    ),
    "T5": (
        "encoder and decoder",
        {
            **SMALL,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "Mpnet": ("encoder, relative positions", SMALL),
}
TEXT_CLASSES = {"Mpnet": "MPNet"}


def transformers_entries() -> list[Entry]:
    """Text, image and sound classifiers of transformers, from small configurations."""
    import transformers

    def made(name: str, suffix: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            config = getattr(transformers, f"{name}Config")(**options)
            return getattr(transformers, f"{name}{suffix}")(config)

        return make

    entries = [
        Entry(
            f"{TEXT_CLASSES.get(name, name)}{TEXT}",
            "transformers",
            f"text: {family}",
            made(TEXT_CLASSES.get(name, name), TEXT, options),
            texts(mask=name != "FNet"),
        )
        for name, (family, options) in TRANSFORMERS.items()
    ]
    image = "ForImageClassification"
    vision = {
        "ViT": TINY_VISION,
        "DeiT": TINY_VISION,
        "Beit": TINY_VISION,
        "Dinov2": {**TINY_VISION, "mlp_ratio": 2},
        "Swin": {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "num_labels": CLASSES,
        },
        "ConvNext": {
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "num_stages": 2,
            "num_labels": CLASSES,
        },
        "ResNet": {
            "embedding_size": 16,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "num_labels": CLASSES,
            "layer_type": "basic",
        },
        "MobileViT": {
            "image_size": 64,
            "num_labels": CLASSES,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48],
            "num_attention_heads": 2,
        },
        "Segformer": {
            "num_labels": CLASSES,
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 16, 16, 32],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
    }
    entries += [
        Entry(
            f"{name}{image}",
            "transformers",
            "image",
            made(name, image, options),
            lambda n, g, size=64 if name == "MobileViT" else 32: {
                "pixel_values": torch.randn(n, 3, size, size, generator=g)
            },
        )
        for name, options in vision.items()
    ]
    entries += [
        Entry(
            f"{name}{TEXT}",
            "transformers",
            "sound",
            made(name, TEXT, AUDIO),
            waves(800),
        )
        for name in ("Wav2Vec2", "Hubert", "WavLM")
    ]
    return entries


class Recurrent(nn.Module):
    """An LSTM over packed sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (n, c)."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(input_ids),
            attention_mask.sum(1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        last = self.rnn(packed)[1][0]
        return self.head(torch.cat([last[0], last[1]], dim=1))


def sequence_network(cell: type[nn.RNNBase]) -> nn.Module:
    """A recurrent network over real sequences."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = (
                cell(4, 16, num_layers=2, batch_first=True),
                nn.Linear(16, CLASSES),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    return Last()


def tabular(width: int = 8) -> nn.Module:
    """A perceptron for tables."""
    return nn.Sequential(
        nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)
    )


def torch_entries() -> list[Entry]:
    """What people write themselves, and what they wrap around it."""
    rows = lambda n, g: torch.randn(n, 8, generator=g)  # noqa: E731
    sequences = lambda n, g: torch.randn(n, 10, 4, generator=g)  # noqa: E731
    half = lambda dtype: lambda n, g: torch.randn(n, 8, generator=g).to(dtype)  # noqa: E731
    return [
        Entry("perceptron", "torch", "table", tabular, rows),
        Entry("LSTM", "torch", "recurrent", lambda: sequence_network(nn.LSTM), sequences),
        Entry("GRU", "torch", "recurrent", lambda: sequence_network(nn.GRU), sequences),
        Entry("LSTM, packed", "torch", "recurrent", Recurrent, texts()),
        Entry(
            "torch.compile",
            "torch",
            "wrapped",
            lambda: torch.compile(tabular(), backend="eager"),
            rows,
        ),
        Entry("DataParallel", "torch", "wrapped", lambda: nn.DataParallel(tabular()), rows),
        Entry(
            "bfloat16",
            "torch",
            "half precision",
            lambda: tabular().bfloat16(),
            half(torch.bfloat16),
        ),
        Entry("float16", "torch", "half precision", lambda: tabular().half(), half(torch.float16)),
    ]


LIBRARIES: dict[str, Callable[[], list[Entry]]] = {
    "torch": torch_entries,
    "torchvision": torchvision_entries,
    "timm": timm_entries,
    "transformers": transformers_entries,
}


def large_entries() -> list[Entry]:
    """Models of the size that people have, at the size of images that they have."""
    import torchvision.models as tv
    import transformers

    def bert() -> nn.Module:
        return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))

    def photos(name: str, make: Callable[[], nn.Module]) -> Entry:
        return Entry(name, "torchvision", "c = 1000", make, images(224), True, classes=1000)

    return [
        Entry("BERT-base", "transformers", "c = 2", bert, texts(32), True, classes=2),
        photos("ResNet-50", lambda: tv.resnet50(weights=None)),
        photos("ConvNeXt-T", lambda: tv.convnext_tiny(weights=None)),
        photos("ViT-B/16", lambda: tv.vit_b_16(weights=None)),
    ]
