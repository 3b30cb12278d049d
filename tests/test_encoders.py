"""Frozen encoders: preprocessing and tokens against the formulas written out here, loading, and errors."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from fakes.broken import Bomb
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vrpo_plugin.encoders import REPA_ENCODERS, FrozenEncoder, load_encoder, load_encoders
from vrpo_plugin.errors import CheckpointError, ConfigError, DataError, ShapeError, WeightsNotFoundError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = "vit_small_patch14_dinov2.lvd142m"


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def dinov2() -> nn.Module:
    """A DINOv2 of timm with random weights, at its native 37 x 37 patches; position embedding of unit size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(DINOV2, num_classes=0).eval()
        nn.init.normal_(model.pos_embed)
    return model


@pytest.fixture(scope="module")
def dinov2_file(dinov2: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(dinov2.state_dict(), path)
    return path


def random_images(batch: int, size: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images / 255.0 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def saved(model: nn.Module, path: Path, **extra: Tensor) -> Path:
    torch.save({**model.state_dict(), **extra}, path)
    return path


@pytest.mark.parametrize(("resolution", "side"), [(256, 224), (512, 448)])
def test_dinov2_preprocessing_is_repas(dinov2_file: Path, resolution: int, side: int) -> None:
    encoder = load_encoder("dinov2-vit-s", resolution=resolution, checkpoint=dinov2_file)
    images = random_images(2, resolution)
    expected = F.interpolate(normalised(images, IMAGENET_MEAN, IMAGENET_STD), 224 * (resolution // 256), mode="bicubic")
    actual = encoder.preprocess(images)
    assert actual.shape == (2, 3, side, side)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert encoder.grid == (side // 14, side // 14)


def test_dinov2_tokens_are_repas(dinov2: nn.Module, dinov2_file: Path) -> None:
    reference = copy.deepcopy(dinov2)
    reference.patch_embed.set_input_size((224, 224))
    reference.pos_embed = nn.Parameter(resample_abs_pos_embed(dinov2.pos_embed.data, [16, 16]))
    images = random_images(2, 256)
    pixels = F.interpolate(normalised(images, IMAGENET_MEAN, IMAGENET_STD), 224, mode="bicubic")
    with torch.no_grad():
        x = reference.patch_embed(pixels)
        x = torch.cat([reference.cls_token.expand(2, -1, -1), x], dim=1) + reference.pos_embed
        expected = reference.norm(reference.blocks(x))[:, 1:]
    tokens = load_encoder(DINOV2, resolution=256, checkpoint=dinov2_file)(images)
    assert tokens.shape == (2, 256, 384)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_hub_weights_take_the_same_road(dinov2: nn.Module, dinov2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the download: the native-size model that timm would return.
    create = timm.create_model

    def downloaded(name: str, pretrained: bool = False, **kwargs: object) -> nn.Module:
        return copy.deepcopy(dinov2) if pretrained else create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", downloaded)
    images = random_images(1, 256)
    from_hub = load_encoder("dinov2-vit-s", resolution=256)
    from_file = load_encoder("dinov2-vit-s", resolution=256, checkpoint=dinov2_file)
    assert torch.equal(from_hub(images), from_file(images))


def test_repa_names_are_timm_models() -> None:
    assert len(REPA_ENCODERS) == 8
    assert set(REPA_ENCODERS.values()) <= set(timm.list_models(pretrained=True))
    assert REPA_ENCODERS["dinov2reg-vit-l"] == "vit_large_patch14_reg4_dinov2.lvd142m"


def test_mean_and_std_are_the_models_own() -> None:
    encoder = load_encoder("test_vit.r160_in1k", resolution=64, pretrained=False)
    images = random_images(2, 64)
    expected = normalised(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    torch.testing.assert_close(encoder.preprocess(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", DINOV2])
def test_uint8_and_float_agree(name: str) -> None:
    encoder = load_encoder(name, resolution=64, pretrained=False)
    images = random_images(2, 64)
    floats = images.double() / 127.5 - 1
    torch.testing.assert_close(encoder.preprocess(floats), encoder.preprocess(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder(floats.float()), encoder(images), rtol=0, atol=1e-4)


def test_one_channel_is_repeated() -> None:
    encoder = load_encoder("test_vit", resolution=32, pretrained=False)
    grey = random_images(2, 32, channels=1)
    assert torch.equal(encoder(grey), encoder(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("test_vit", 1), ("vit_small_patch14_reg4_dinov2", 5), ("deit_tiny_distilled_patch16_224", 2)],
)
def test_prefix_tokens_are_dropped(name: str, prefix: int) -> None:
    encoder = load_encoder(name, resolution=64, pretrained=False)
    images = random_images(2, 64)
    with torch.no_grad():
        everything = encoder.model.forward_features(encoder.preprocess(images))
    assert everything.shape[1] == 16 + prefix
    assert torch.equal(encoder(images), everything[:, prefix:])


@pytest.mark.parametrize(
    ("name", "dim", "last_axis"),
    [("resnet18", 512, False), ("convnext_atto", 320, False), ("swin_tiny_patch4_window7_224", 768, True)],
)
def test_feature_maps_become_tokens_row_by_row(name: str, dim: int, last_axis: bool) -> None:
    encoder = load_encoder(name, resolution=96, pretrained=False)
    images = random_images(2, 96)
    tokens = encoder(images)
    assert (encoder.dim, encoder.grid, encoder.input_size) == (dim, (3, 3), 96)
    with torch.no_grad():
        features = encoder.model.forward_features(encoder.preprocess(images))
    for row, column in ((0, 0), (0, 2), (2, 1)):
        at = features[:, row, column] if last_axis else features[:, :, row, column]
        assert torch.equal(tokens[:, 3 * row + column], at)


@pytest.mark.parametrize(
    ("name", "resolution", "token_grid", "input_size"),
    [
        ("test_vit", 256, None, 256),
        ("test_vit", 8, None, 16),
        ("test_vit", 64, (2, 2), 64),
        ("test_vit", 32, (8, 8), 128),
        ("resnet18", 64, None, 64),
        ("resnet18", 64, (4, 4), 128),
        ("vit_small_patch16_dinov3", 64, None, 64),
        ("vit_pe_spatial_tiny_patch16_512", 64, (3, 5), 80),
        ("mixer_s32_224", 64, (4, 4), 224),
    ],
)
def test_input_size_and_grid(name: str, resolution: int, token_grid: tuple[int, int] | None, input_size: int) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    encoder = load_encoder(name, resolution=resolution, token_grid=token_grid, pretrained=False)
    tokens = encoder(random_images(2, resolution))
    assert encoder.input_size == input_size
    assert token_grid is None or encoder.grid == token_grid
    assert tokens.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.dim)


def test_token_grid_is_an_antialiased_resize(tmp_path: Path) -> None:
    path = saved(timm.create_model("test_vit", num_classes=0), tmp_path / "vit.pt")
    images = random_images(2, 64)
    own = load_encoder("test_vit", resolution=64, checkpoint=path)(images)
    half = load_encoder("test_vit", resolution=64, token_grid=(2, 2), checkpoint=path)(images)
    maps = F.interpolate(own.mT.unflatten(2, (4, 4)), (2, 2), mode="bilinear", antialias=True)
    expected = maps.flatten(2).mT
    torch.testing.assert_close(half, expected)


def test_frozen_and_unregistered() -> None:
    encoder = load_encoder("test_vit", resolution=32, pretrained=False)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    assert not encoder(pixels).requires_grad
    owner = nn.Linear(2, 2)
    owner.encoder = encoder
    assert set(owner.state_dict()) == {"weight", "bias"}
    assert len(list(owner.parameters())) == 2
    assert copy.deepcopy(owner).encoder is encoder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_tokens_are_float32(dtype: torch.dtype | None, autocast: bool) -> None:
    encoder = load_encoder("convnext_atto", resolution=32, pretrained=False, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = encoder(random_images(2, 32))
    assert next(encoder.model.parameters()).dtype == (dtype or torch.float32)
    assert tokens.dtype == torch.float32
    assert tokens.isfinite().all()


def test_loading_and_encoding_leave_the_global_generator_alone(tmp_path: Path) -> None:
    path = saved(timm.create_model("test_vit", num_classes=0), tmp_path / "vit.pt")
    before = torch.random.get_rng_state()
    load_encoder("test_vit", resolution=32, pretrained=False)(random_images(1, 32))
    load_encoder("test_vit", resolution=32, checkpoint=path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_checkpoint_formats(tmp_path: Path, suffix: str) -> None:
    model = timm.create_model("test_vit")  # with its classifier, which tokens do not need
    path = tmp_path / f"vit.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()}, path)
    encoder = load_encoder("test_vit", resolution=160, checkpoint=path)
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_checkpoint_in_the_authors_layout(dinov2: nn.Module, tmp_path: Path) -> None:
    path = saved(dinov2, tmp_path / "dinov2_vits14_pretrain.pth", mask_token=torch.zeros(1, 384))
    encoder = load_encoder("dinov2-vit-s", resolution=256, checkpoint=path)
    expected = resample_abs_pos_embed(dinov2.pos_embed.data, [16, 16])
    assert torch.equal(encoder.model.pos_embed, expected)


def test_several_encoders(tmp_path: Path) -> None:
    path = saved(timm.create_model("test_vit", num_classes=0), tmp_path / "vit.pt")
    encoders = load_encoders(
        "test_vit,resnet18", resolution=64, token_grid=(4, 4), pretrained=False, checkpoints=[path, None]
    )
    images = random_images(2, 64)
    tokens = encoders.to("cpu")(images)
    assert encoders.names == ("test_vit", "resnet18")
    assert encoders.dims == (64, 512)
    assert encoders.grids == ((4, 4), (4, 4))
    assert [tuple(z.shape) for z in tokens] == [(2, 16, 64), (2, 16, 512)]
    assert torch.equal(tokens[0], load_encoder("test_vit", resolution=64, checkpoint=path)(images))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(1, 4, 32, 32),
        torch.zeros(1, 3, 32, 48),
        torch.zeros(1, 3, 32, 32, dtype=torch.int64),
    ],
    ids=["unbatched", "latents", "not square", "int64"],
)
def test_wrong_images(images: Tensor) -> None:
    encoder = load_encoder("test_vit", resolution=32, pretrained=False)
    with pytest.raises(ShapeError, match="images: expected"):
        encoder(images)


@pytest.mark.parametrize("value", [255.0, float("nan")])
def test_float_images_out_of_range(value: float) -> None:
    encoder = load_encoder("test_vit", resolution=32, pretrained=False)
    with pytest.raises(DataError, match=r"\[-1, 1\]"):
        encoder(torch.full((1, 3, 32, 32), value))


@pytest.mark.parametrize("name", ["vit_base_patch14_dinov2.lvd142", "vit_base_patch14_dinov3", "dinov2-vit-B"])
def test_unknown_name_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match="dinov2"):
        load_encoder(name, resolution=256)


@pytest.mark.parametrize("kwargs", [{"resolution": 0}, {"resolution": 32, "token_grid": (0, 4)}])
def test_bad_sizes(kwargs: dict) -> None:
    with pytest.raises(ConfigError, match="token_grid"):
        load_encoder("test_vit", pretrained=False, **kwargs)


@pytest.mark.parametrize("checkpoints", ["ab", ["a.pt"]])
def test_one_checkpoint_for_two_encoders(checkpoints: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="one checkpoint"):
        load_encoders(["test_vit", "resnet18"], resolution=32, checkpoints=checkpoints)


def test_model_without_a_token_grid() -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    model.num_prefix_tokens = 0  # 5 tokens: no square
    with pytest.raises(ConfigError, match="square grid"):
        FrozenEncoder(model, "odd", 32)


def test_offline_names_the_file_and_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the library read the variable when imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsNotFoundError) as error:
        load_encoder("dinov2-vit-s", resolution=256)
    for part in (
        "dinov2-vit-s",
        "model.safetensors of timm/vit_small_patch14_dinov2.lvd142m",
        "checkpoint=/path/to/model.safetensors",
        "--enc-checkpoint",
        "pretrained=False",
    ):
        assert part in str(error.value)


def test_model_without_published_weights_is_not_left_random() -> None:
    with pytest.raises(WeightsNotFoundError, match="publishes no weights"):
        load_encoder("mixer_s32_224", resolution=224)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"no file at .*absent\.safetensors"):
        load_encoder("test_vit", resolution=32, checkpoint=tmp_path / "absent.safetensors")


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = saved(timm.create_model("resnet18"), tmp_path / "resnet.pt")
    with pytest.raises(CheckpointError, match=r"missing keys \(cls_token.*unexpected keys \(conv1\.weight"):
        load_encoder("test_vit", resolution=32, checkpoint=path)


def test_checkpoint_of_another_width(tmp_path: Path) -> None:
    path = saved(timm.create_model("test_vit", num_classes=0, embed_dim=32), tmp_path / "narrow.pt")
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_encoder("test_vit", resolution=32, checkpoint=path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        load_encoder("test_vit", resolution=32, checkpoint=path)


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": Bomb()}, "bomb.pt")
    with pytest.raises(CheckpointError):
        load_encoder("test_vit", resolution=32, checkpoint="bomb.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("value", [127.0, -3.0, float("inf")])
def test_a_later_float_batch_out_of_range(value: float) -> None:
    encoder = load_encoder("test_vit", resolution=32, pretrained=False)
    encoder(torch.rand(1, 3, 32, 32) * 2 - 1)
    images = torch.full((1, 3, 32, 32), value)
    if math.isfinite(value):
        with pytest.raises(DataError, match=r"expected floats in \[-1, 1\], got values from"):
            encoder(images)
    else:  # what is not finite leaves out its sample
        encoder(images)


def test_pixels_from_0_to_1_are_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    encoder = load_encoder("test_vit", resolution=32, pretrained=False)
    recwarn.clear()
    for _ in range(2):
        encoder(torch.rand(1, 3, 32, 32))
    assert len([w for w in recwarn if "If these are pixels in [0, 1]" in str(w.message)]) == 1


@pytest.mark.parametrize("name", ["coat_mini", "crossvit_tiny_240", "pit_ti_224", "halonet26t"])
def test_a_network_whose_features_are_no_grid_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"encoder '{name}': expected a square grid of tokens, or a feature map"):
        load_encoder(name, resolution=64, pretrained=False)


def test_features_of_another_layout_are_refused() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=64)
    model.output_fmt = "NCHW"  # its channels stand last all the same
    with pytest.raises(ConfigError, match=r"of which 768 are channels"):
        FrozenEncoder(model, "odd", 64)
