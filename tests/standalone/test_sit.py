"""vrpo_plugin.standalone.sit: REPA's names, shapes and numerics."""

import importlib.util
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vrpo_plugin.errors import ConfigError, ShapeError
from vrpo_plugin.standalone.sit import SIT_MODELS, SiT, create_sit, sincos_position_embedding

SIZES: dict[str, Any] = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "encoder_depth": 1,
    "z_dims": (6,),
    "projector_dim": 8,
}

BLOCK_SHAPES = {
    "attn.qkv.weight": (48, 16),
    "attn.qkv.bias": (48,),
    "attn.proj.weight": (16, 16),
    "attn.proj.bias": (16,),
    "mlp.fc1.weight": (64, 16),
    "mlp.fc1.bias": (64,),
    "mlp.fc2.weight": (16, 64),
    "mlp.fc2.bias": (16,),
    "adaLN_modulation.1.weight": (96, 16),
    "adaLN_modulation.1.bias": (96,),
}

# The names and shapes of a REPA checkpoint: a change here means that none loads any more.
SHAPES = {
    "pos_embed": (1, 4, 16),
    "x_embedder.proj.weight": (16, 3, 2, 2),
    "x_embedder.proj.bias": (16,),
    "t_embedder.mlp.0.weight": (16, 256),
    "t_embedder.mlp.0.bias": (16,),
    "t_embedder.mlp.2.weight": (16, 16),
    "t_embedder.mlp.2.bias": (16,),
    "y_embedder.embedding_table.weight": (6, 16),
    **{f"blocks.0.{name}": shape for name, shape in BLOCK_SHAPES.items()},
    **{f"blocks.1.{name}": shape for name, shape in BLOCK_SHAPES.items()},
    "projectors.0.0.weight": (8, 16),
    "projectors.0.0.bias": (8,),
    "projectors.0.2.weight": (8, 8),
    "projectors.0.2.bias": (8,),
    "projectors.0.4.weight": (6, 8),
    "projectors.0.4.bias": (6,),
    "final_layer.linear.weight": (12, 16),
    "final_layer.linear.bias": (12,),
    "final_layer.adaLN_modulation.1.weight": (32, 16),
    "final_layer.adaLN_modulation.1.bias": (32,),
}


def randomised(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Every parameter random: at its own initialisation a SiT predicts zero, whatever its blocks do."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return model


def batch(size: int = 3, *, input_size: int = 4, channels: int = 3, classes: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, channels, input_size, input_size, generator=generator)
    t = torch.rand(size, generator=generator)
    return x, t, torch.randint(0, classes, (size,), generator=generator)


@pytest.fixture
def model() -> SiT:
    return randomised(SiT(**SIZES)).eval()


@pytest.fixture
def repa_sit() -> ModuleType:
    if "VRPO_HOSTS_DIR" not in os.environ:
        pytest.skip("VRPO_HOSTS_DIR is unset: no REPA checkout to compare with")
    path = Path(os.environ["VRPO_HOSTS_DIR"]) / "REPA" / "models" / "sit.py"
    spec = importlib.util.spec_from_file_location("repa_sit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numpy_sit(w: dict[str, np.ndarray], x: np.ndarray, t: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SiT's equations for SIZES, with one loop for every index that the model treats by a reshape."""

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    def gelu(v: np.ndarray) -> np.ndarray:
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def norm(v: np.ndarray) -> np.ndarray:
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def attend(name: str, v: np.ndarray) -> np.ndarray:
        q, k, u = np.split(linear(f"{name}.qkv", v), 3, axis=-1)
        heads = []
        for i in range(2):
            part = slice(8 * i, 8 * i + 8)
            logits = np.exp(q[:, part] @ k[:, part].T / math.sqrt(8))
            heads.append(logits / logits.sum(-1, keepdims=True) @ u[:, part])
        return linear(f"{name}.proj", np.concatenate(heads, -1))

    velocity, z_tilde = np.zeros_like(x), []
    for b in range(len(x)):
        angle = t[b] * 10000.0 ** (-np.arange(128) / 128)
        time = linear(
            "t_embedder.mlp.2",
            silu(linear("t_embedder.mlp.0", np.concatenate([np.cos(angle), np.sin(angle)]))),
        )
        c = silu(time + w["y_embedder.embedding_table.weight"][y[b]])
        corners = [(row, column) for row in (0, 2) for column in (0, 2)]
        kernel = w["x_embedder.proj.weight"]
        tokens = np.stack([np.tensordot(kernel, x[b, :, r : r + 2, s : s + 2], axes=3) for r, s in corners])
        h = tokens + w["x_embedder.proj.bias"] + w["pos_embed"][0]
        for i in range(2):
            block = f"blocks.{i}"
            m = np.split(linear(f"{block}.adaLN_modulation.1", c), 6)
            h = h + m[2] * attend(f"{block}.attn", norm(h) * (1 + m[1]) + m[0])
            inner = gelu(linear(f"{block}.mlp.fc1", norm(h) * (1 + m[4]) + m[3]))
            h = h + m[5] * linear(f"{block}.mlp.fc2", inner)
            if i == 0:
                hidden = silu(linear("projectors.0.0", h))
                z_tilde.append(linear("projectors.0.4", silu(linear("projectors.0.2", hidden))))
        shift, scale = np.split(linear("final_layer.adaLN_modulation.1", c), 2)
        patches = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
        for n, (r, s) in enumerate(corners):
            for p in range(2):
                for q in range(2):
                    velocity[b, :, r + p, s + q] = patches[n, 6 * p + 3 * q : 6 * p + 3 * q + 3]
    return velocity, np.stack(z_tilde)


def test_state_dict_has_the_names_and_shapes_of_repa() -> None:
    assert {name: tuple(v.shape) for name, v in SiT(**SIZES).state_dict().items()} == SHAPES


def test_without_encoders_there_are_no_projector_names() -> None:
    names = SiT(**{**SIZES, "z_dims": ()}).state_dict().keys()
    assert set(names) == {name for name in SHAPES if not name.startswith("projectors")}


def test_forward_is_the_numpy_oracle(model: SiT) -> None:
    x, t, y = batch()
    weights = {name: v.double().numpy() for name, v in model.state_dict().items()}
    velocity, (z_tilde,) = model(x, t, y, return_projections=True)
    expected, expected_tokens = numpy_sit(weights, x.double().numpy(), t.double().numpy(), y.numpy())
    np.testing.assert_allclose(velocity.detach(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z_tilde.detach(), expected_tokens, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_projectors_run_only_on_request(model: SiT) -> None:
    x, t, y = batch()
    calls: list[int] = []
    model.projectors[0].register_forward_hook(lambda *_: calls.append(1))
    velocity = model(x, t, y)
    assert calls == []
    assert torch.equal(velocity, model(x, t, y, return_projections=True)[0])
    assert calls == [1]


def test_position_embedding_has_the_column_first() -> None:
    embedding = sincos_position_embedding(8, 3)
    for row in range(3):
        for column in range(3):
            expected = [
                wave(position * frequency)
                for position in (column, row)
                for wave in (math.sin, math.cos)
                for frequency in (1.0, 0.01)
            ]
            torch.testing.assert_close(embedding[3 * row + column], torch.tensor(expected))


def test_initialisation() -> None:
    model = SiT(**{**SIZES, "hidden_size": 128, "num_classes": 100})
    x, t, y = batch()
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0], sincos_position_embedding(128, 2))
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (model.blocks[1].attn.qkv.weight, model.x_embedder.proj.weight.flatten(1)):
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for block in model.blocks:
        assert not block.adaLN_modulation[1].weight.any()


def test_labels_drop_in_training_at_the_given_rate() -> None:
    model = SiT(**{**SIZES, "class_dropout_prob": 0.25})
    seen: list[Tensor] = []
    model.y_embedder.embedding_table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = torch.arange(4000) % 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.train().y_embedder(y)
    dropped = seen[0] == model.null_label
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[0][~dropped], y[~dropped])
    model.eval().y_embedder(y)
    assert torch.equal(seen[1], y)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
@pytest.mark.parametrize("training", [True, False])
def test_forced_drop_is_the_null_label_without_a_random_draw(model: SiT, dtype: torch.dtype, training: bool) -> None:
    x, t, y = batch()
    drop = torch.tensor([1, 0, 1])
    expected = model(x, t, torch.where(drop == 1, 5, y))
    state = torch.get_rng_state()
    velocity = model.train(training)(x, t, y, force_drop_ids=drop.to(dtype))
    assert torch.equal(velocity, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_unconditional_model_needs_no_labels() -> None:
    model = randomised(SiT(**{**SIZES, "num_classes": 0}))
    x, t, y = batch()
    state = torch.get_rng_state()
    velocity = model(x, t)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(velocity, model(x, t, y))
    assert model.null_label == 0


def test_without_dropout_there_is_no_null_label() -> None:
    model = SiT(**{**SIZES, "class_dropout_prob": 0.0})
    assert model.null_label is None
    assert model.y_embedder.embedding_table.num_embeddings == 5
    x, t, y = batch()
    with pytest.raises(ConfigError, match="class_dropout_prob > 0"):
        model(x, t, y, force_drop_ids=torch.ones(3))


def test_checkpointing_keeps_values_gradients_and_one_hook_call_per_block(model: SiT) -> None:
    x, t, y = batch()
    calls: list[torch.Size] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
        block.register_forward_hook(lambda _, args, out: calls.append(out.shape))
    transforms: list[int] = []
    model.blocks[0].norm1.register_forward_hook(lambda *_: transforms.append(1))

    def run() -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        velocity, (z_tilde,) = model(x, t, y, return_projections=True)
        (velocity.square().sum() + z_tilde.sum()).backward()
        return velocity, [p.grad for p in model.parameters()]

    velocity, gradients = run()
    assert len(transforms) == 1
    model.gradient_checkpointing = True
    recomputed, recomputed_gradients = run()
    assert len(transforms) == 1 + 2
    assert calls == [torch.Size([3, 4, 16])] * 8
    assert torch.equal(velocity, recomputed)
    for ours, theirs in zip(recomputed_gradients, gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_qk_norm_normalises_queries_and_keys(model: SiT) -> None:
    normed = SiT(**SIZES, qk_norm=True).eval()
    missing, unexpected = normed.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == {f"blocks.{i}.attn.{q}_norm.{p}" for i in (0, 1) for q in "qk" for p in ("weight", "bias")}
    x, t, y = batch()
    before = normed(x, t, y)
    for block in normed.blocks:  # layer norm does not see the scale of its input
        block.attn.qkv.weight.data[:32] *= 3
        block.attn.qkv.bias.data[:32] *= 3
    torch.testing.assert_close(normed(x, t, y), before, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model(x, t, y), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(model: SiT, checkpointing: bool) -> None:
    x, t, y = batch()
    model.gradient_checkpointing = checkpointing
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


def test_a_model_in_bfloat16_takes_float32_times(model: SiT) -> None:
    x, t, y = batch()
    velocity = model.bfloat16()(x.bfloat16(), t, y)
    assert velocity.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 5}, "input_size: expected a multiple of patch_size"),
        ({"num_heads": 3}, "hidden_size: expected a multiple of num_heads"),
        ({"hidden_size": 18}, "hidden_size: expected a multiple of 4"),
        ({"encoder_depth": 3}, "encoder_depth: expected 1 to 2, got 3"),
        ({"encoder_depth": 0}, "encoder_depth: expected 1 to 2, got 0"),
    ],
)
def test_contradicting_sizes_raise(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SiT(**{**SIZES, **change})


def test_wrong_input_raises(model: SiT) -> None:
    x, t, y = batch()
    with pytest.raises(ConfigError, match="num_classes=0"):
        model(x, t)
    with pytest.raises(ShapeError, match=r"expected \('B', 3, 4, 4\), got \(3, 3, 4, 2\)"):
        model(x[..., :2], t, y)


def test_create_sit_by_name() -> None:
    with torch.device("meta"):
        model = create_sit("SiT-XL/2", input_size=32)
    # Table 1 of the SiT paper: 675M parameters.
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 675
    assert (model.depth, model.hidden_size, model.null_label) == (28, 1152, 1000)
    assert len(create_sit("SiT-Ti/1", input_size=4, z_dims=(6,), depth=3).blocks) == 3
    assert {name.split("-")[1] for name in SIT_MODELS} == {
        *(f"{size}/{p}" for size in ("XL", "L", "B", "S") for p in (2, 4, 8)),
        "Ti/1",
        "Ti/2",
    }


def test_create_sit_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'SiT-B2'. Nearest: \['SiT-B/2'"):
        create_sit("SiT-B2", input_size=32)


@pytest.mark.host
def test_equals_repa_bitwise(repa_sit: ModuleType) -> None:
    sizes = {**SIZES, "z_dims": (6, 10), "depth": 3, "encoder_depth": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = repa_sit.SiT(**sizes, decoder_hidden_size=16, qk_norm=False)
        torch.manual_seed(0)
        ours = SiT(**sizes)
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name]), name
        for source, target in ((theirs, ours), (ours, theirs)):
            randomised(source, seed=2)
            target.load_state_dict(source.state_dict(), strict=True)
            for training in (True, False):
                torch.manual_seed(3)
                velocity, z_tilde = theirs.train(training)(*batch(16))
                torch.manual_seed(3)
                same, same_tokens = ours.train(training)(*batch(16), return_projections=True)
                assert torch.equal(velocity, same)
                assert all(torch.equal(a, b) for a, b in zip(z_tilde, same_tokens, strict=True))


@pytest.mark.host
@pytest.mark.parametrize("name", ["SiT-XL/2", "SiT-L/4", "SiT-B/8", "SiT-S/2"])
def test_named_sizes_have_the_names_and_shapes_of_repa(
    repa_sit: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repa_sit.SiT, "initialize_weights", lambda self: None)
    # REPA's own SiT-S leaves the final layer at another width than its blocks.
    width = {"decoder_hidden_size": 384} if name.startswith("SiT-S/") else {}
    with torch.device("meta"):
        theirs = repa_sit.SiT_models[name](input_size=32, z_dims=[768], qk_norm=False, **width)
        ours = create_sit(name, input_size=32, z_dims=(768,))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
