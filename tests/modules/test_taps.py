"""vrpo_plugin.modules.taps, and the attaching and detaching that installs them."""

import copy
from collections.abc import Iterator

import pytest
import torch
from fakes.tiny_sit import TinySiT, align, denoising_loss, gradients, make_batch, tiny_aligner
from torch import nn

from vrpo_plugin.errors import ConfigError, HostNotFoundError, PatchConflictError
from vrpo_plugin.modules.aligner import VRPOAligner
from vrpo_plugin.modules.taps import resolve_layers


def kept(aligner: VRPOAligner) -> list[bool]:
    return [tap.hidden is not None for tap in aligner.taps.taps]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("layers", "depth", "encoder_depth", "expected"),
    [
        ("early", 28, 8, (8,)),
        ("early", 28, None, (9,)),
        ("early", 12, None, (4,)),
        ("early", 1, None, (1,)),
        ("middle", 28, 8, (14,)),
        ("middle", 1, None, (1,)),
        ("all", 4, 2, (1, 2, 3, 4)),
        ((3, 1), 4, 2, (1, 3)),
        ([4], 4, None, (4,)),
    ],
)
def test_resolve_layers(layers: object, depth: int, encoder_depth: int | None, expected: tuple[int, ...]) -> None:
    assert resolve_layers(layers, depth, encoder_depth=encoder_depth) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [(0,), (5,), (1, 1), (), (2, 5)])
def test_blocks_that_do_not_exist_are_an_error(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"layers: expected distinct block numbers from 1 to 4, got .*\. Choose"):
        resolve_layers(layers, 4)


def test_an_encoder_depth_beyond_the_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="from 1 to 4"):
        tiny_aligner(encoder_depth=8)


@pytest.mark.parametrize(
    ("layers", "blocks"), [("early", [1]), ("middle", [2]), ("all", [1, 2, 3, 4]), ((4, 2), [2, 4])]
)
def test_taps_keep_the_output_of_their_blocks(layers: object, blocks: list[int]) -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner(layers=layers).attach(model)
    outputs: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda _, __, output, number=number: outputs.__setitem__(number, output))
    model(batch.x_t, batch.t, batch.y)
    taken = aligner.taps.take()
    assert len(taken) == len(blocks)
    assert all(hidden is outputs[number] for hidden, number in zip(taken, blocks, strict=True))


def test_early_is_the_hosts_own_depth() -> None:
    assert tiny_aligner(encoder_depth=3).layers == (3,)
    assert tiny_aligner().layers == (1,)


def test_sampling_keeps_nothing() -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner().attach(model)
    with torch.no_grad():
        model(batch.x_t, batch.t, batch.y)
    assert kept(aligner) == [False]
    model.blocks[0](torch.randn(4, 16, 32), torch.randn(4, 32))  # nor does it wait for a later run of the block
    assert kept(aligner) == [False]
    with torch.inference_mode():
        model(batch.x_t, batch.t, batch.y)
    assert kept(aligner) == [False]
    model(batch.x_t, batch.t, batch.y)
    assert kept(aligner) == [True]


def test_a_preview_drops_what_an_earlier_call_kept() -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner().attach(model)
    model(batch.x_t, batch.t, batch.y)
    with torch.no_grad():
        model(batch.x_t, batch.t, batch.y)
    with pytest.raises(HostNotFoundError, match="0 of 1 taps fired"):
        aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch.velocity)


def test_nothing_is_kept_after_the_aligner_has_taken_it() -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner(layers="all").attach(model)
    align(model, aligner, batch).loss.backward()
    assert kept(aligner) == [False] * 4


def test_a_block_called_alone_is_not_the_models_call() -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner(layers=(1,)).attach(model)
    align(model, aligner, batch)
    model.blocks[0](torch.randn(4, 16, 32), torch.randn(4, 32))
    assert kept(aligner) == [False]


def test_only_the_first_run_of_a_block_in_a_call_counts() -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner(layers=(1,)).attach(model)
    model(batch.x_t, batch.t, batch.y)
    first = aligner.taps.taps[0].hidden
    model.blocks[0](torch.randn(4, 16, 32), torch.randn(4, 32))
    assert aligner.taps.take()[0] is first


@pytest.mark.parametrize("moment", ["before a call", "with a kept activation", "after a step"])
def test_a_deep_copy_has_taps_of_its_own(moment: str) -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner(layers=(1, 3)).attach(model)
    if moment == "with a kept activation":
        model(batch.x_t, batch.t, batch.y)
    elif moment == "after a step":
        align(model, aligner, batch).loss.backward()
    waiting = kept(aligner)
    copied = copy.deepcopy(model)
    twin = copied.get_submodule("vrpo")
    assert isinstance(twin, VRPOAligner) and twin is not aligner
    assert kept(aligner) == waiting and kept(twin) == [False, False]

    aligner.taps.arm(model, ())  # forget, so that a hook of the copy that fired here would show
    copied(batch.x_t, batch.t, batch.y)
    assert kept(aligner) == [False, False] and kept(twin) == [True, True]
    twin(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch.velocity)
    align(model, aligner, batch)
    assert kept(twin) == [False, False]
    twin.detach(copied)
    assert hooks(copied) == 0 and hooks(model) == 3


@pytest.mark.parametrize("take", [True, False])
def test_checkpointed_activations_leave_no_stale_tensor(take: bool) -> None:
    model, batch = TinySiT(recompute=False), make_batch(4)
    aligner = tiny_aligner(layers=(1, 3)).attach(model)
    velocity = model(batch.x_t, batch.t, batch.y)
    loss = denoising_loss(velocity, batch)
    first = [tap.hidden for tap in aligner.taps.taps]
    if take:
        loss = loss + aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity).loss
    loss.backward()
    if take:
        assert kept(aligner) == [False, False]
    else:  # the blocks ran again in the backward pass, and the first run's tokens are still the ones kept
        assert all(tap.hidden is hidden for tap, hidden in zip(aligner.taps.taps, first, strict=True))


def test_checkpointed_activations_give_the_same_gradients() -> None:
    batch = make_batch(4)
    model = TinySiT()
    aligner = tiny_aligner(layers=(1, 3)).attach(model)
    other = copy.deepcopy(model)
    other.recompute = False
    for each in (model, other):
        align(each, each.get_submodule("vrpo"), batch).loss.backward()  # type: ignore[arg-type]
    expected, got = gradients(model), gradients(other)
    assert expected.keys() == got.keys() and len(list(aligner.parameters()))
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused() -> None:
    model, batch = TinySiT(recompute=True), make_batch(4)
    aligner = tiny_aligner(layers=(3,)).attach(model)
    with pytest.raises(HostNotFoundError, match=r"0 of 1 taps fired\. .*use_reentrant=False"):
        align(model, aligner, batch)


def test_attaching_again_changes_nothing() -> None:
    model = TinySiT()
    aligner = tiny_aligner()
    assert aligner.attach(model) is aligner
    before = hooks(model)
    assert aligner.attach(model) is aligner
    assert hooks(model) == before == 2
    assert model.get_submodule("vrpo") is aligner


def test_another_aligner_is_a_conflict() -> None:
    model = TinySiT()
    aligner = tiny_aligner().attach(model)
    with pytest.raises(PatchConflictError, match=r"model\.vrpo: expected no aligner, got another one\. Call"):
        tiny_aligner().attach(model)
    assert model.vrpo is aligner and hooks(model) == 2


def test_detaching_restores_the_model() -> None:
    model = TinySiT()
    keys, modules, attributes = list(model.state_dict()), list(model.modules()), dict(vars(model))
    seen: list[object] = []
    own = model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    aligner = tiny_aligner(layers="all").attach(model)
    assert hooks(model) == 1 + 4 + 1
    aligner.detach(model)
    assert hooks(model) == 1  # a hook that was there before stays
    own.remove()
    assert list(model.state_dict()) == keys and vars(model) == attributes and not hasattr(model, "vrpo")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    batch = make_batch(4)
    model(batch.x_t, batch.t, batch.y)
    assert kept(aligner) == [False] * 4
    aligner.attach(model)
    align(model, aligner, batch)


def test_detaching_from_another_model_is_an_error() -> None:
    model, other = TinySiT(), TinySiT()
    aligner = tiny_aligner().attach(model)
    tiny_aligner().attach(other)
    for foreign in (other, TinySiT()):
        with pytest.raises(HostNotFoundError, match=r"model\.vrpo: expected this aligner, got none or another\."):
            aligner.detach(foreign)
    assert model.vrpo is aligner and hooks(model) == 2


@pytest.mark.parametrize("depth", [3, 5])
def test_a_model_of_another_depth_is_an_error(depth: int) -> None:
    model = TinySiT(depth=depth)
    with pytest.raises(HostNotFoundError, match=rf"depth=4 blocks, got {depth} blocks\. Set depth="):
        tiny_aligner().attach(model)
    assert not hasattr(model, "vrpo") and hooks(model) == 0


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(HostNotFoundError, match=r"got NoneType\. Set depth= to the model's, or pass blocks="):
        tiny_aligner().attach(nn.Linear(2, 2))


def test_blocks_of_another_name_are_passed() -> None:
    model, batch = TinySiT(), make_batch(4)
    wrapper = nn.ModuleDict({"layers": model.blocks})
    aligner = tiny_aligner().attach(model, blocks=wrapper["layers"])  # type: ignore[arg-type]
    assert torch.isfinite(align(model, aligner, batch).loss)


def test_the_aligner_without_the_models_call_is_an_error() -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner().attach(model)
    with pytest.raises(HostNotFoundError, match=r"blocks \(1,\) to have run .*, got 0 of 1 taps fired\. Call"):
        aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch.velocity)


def test_one_call_of_the_model_serves_one_call_of_the_aligner() -> None:
    model, batch = TinySiT(), make_batch(4)
    aligner = tiny_aligner().attach(model)
    align(model, aligner, batch)
    with pytest.raises(HostNotFoundError, match="0 of 1 taps fired"):
        aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=batch.velocity)


def test_without_a_projector_no_hook_is_installed() -> None:
    for features in ("host", "none"):
        model = TinySiT()
        tiny_aligner(features=features).attach(model)
        assert hooks(model) == 0


# ---- compiled models ----


def aligned_loss(called: nn.Module, aligner: VRPOAligner) -> float:
    batch = make_batch(4)
    velocity = called(batch.x_t, batch.t, batch.y)
    out = aligner(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity)
    out.loss.backward()
    return float(out.features_loss.detach())


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("order", ["baseline first", "baseline between", "itself first"])
def test_a_compiled_models_taps_fire_whatever_was_compiled_before(order: str) -> None:
    batch, model = make_batch(4), TinySiT(depth=2)
    called = compiled(model)
    if order == "baseline first":
        compiled(TinySiT(depth=2))(batch.x_t, batch.t, batch.y).sum().backward()
    elif order == "itself first":
        called(batch.x_t, batch.t, batch.y).sum().backward()
    aligner = tiny_aligner(depth=2, reward_coeff=0.0).attach(model)
    first = aligned_loss(called, aligner)
    if order == "baseline between":
        compiled(TinySiT(depth=2))(batch.x_t, batch.t, batch.y).sum().backward()
        assert kept(aligner) == [False]
    assert aligned_loss(called, aligner) == pytest.approx(first, abs=1e-6)
    assert aligned_loss(model, aligner) == pytest.approx(first, abs=1e-6)


@pytest.mark.usefixtures("nothing_compiled")
def test_attaching_and_detaching_a_compiled_model() -> None:
    batch, model = make_batch(4), TinySiT(depth=2)
    called = compiled(model)
    for target in (model, called):
        one = tiny_aligner(depth=2, reward_coeff=0.0).attach(target)
        aligned_loss(called, one)
        one.detach(target)
        assert hooks(model) == 0 and not hasattr(model, "vrpo")
        called(batch.x_t, batch.t, batch.y).sum().backward()
        assert kept(one) == [False]
    copied = copy.deepcopy(model)
    two = tiny_aligner(depth=2, reward_coeff=0.0).attach(copied)
    aligned_loss(compiled(copied), two)
    called(batch.x_t, batch.t, batch.y).sum().backward()
    assert kept(two) == [False]


# ---- diffusers' EMA, which holds parameters by their places ----


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("made", ["after attach", "before attach"])
def test_diffusers_ema_follows_the_transformer(made: str, foreach: bool) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    model, aligner = TinySiT(), tiny_aligner()
    if made == "after attach":
        aligner.attach(model)

    def averaged() -> list[nn.Parameter]:
        own = {id(p) for p in aligner.parameters()}
        return [p for p in model.parameters() if made == "after attach" or id(p) not in own]

    ema = training_utils.EMAModel(averaged(), decay=0.0, min_decay=0.0, foreach=foreach)
    aligner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    align(model, aligner, make_batch(8)).loss.backward()
    optimizer.step()
    ema.step(averaged())
    torch.testing.assert_close(ema.shadow_params, [p.detach() for p in averaged()])
    aligner.detach(model)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())  # the aligner's come last, so that the others keep their places
    ema.restore(model.parameters())
