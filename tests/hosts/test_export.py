"""``vrpo export``: a checkpoint of a patched run without the aligner, for a host that knows nothing of it."""

import argparse
import copy
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_sit import TINY, TinySiT, denoising_loss, make_batch
from safetensors.torch import load_file
from torch import Tensor, nn

from vrpo_plugin.errors import CheckpointError
from vrpo_plugin.functional.rewards import RewardState
from vrpo_plugin.hosts import checkpoint as module
from vrpo_plugin.hosts.aligner import HostAligner
from vrpo_plugin.hosts.checkpoint import export_checkpoint, is_aligner_parameter, without_aligner
from vrpo_plugin.hosts.guard import make_fused

STEPS = 3


class NormedSiT(TinySiT):
    """With buffers, and a layer that keeps a version in its state (REPA-E's model has one)."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, affine=False)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.bn(x), t, y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = STEPS, first: int = 0) -> None:
    for i in range(first, first + steps):
        batch = make_batch(8, seed=i)
        velocity = model(batch.x_t, batch.t, batch.y)
        loss = denoising_loss(velocity, batch)
        if hasattr(model, "vrpo"):
            out = model.vrpo(batch.z, x0=batch.x0, x_t=batch.x_t, t=batch.t, velocity=velocity, y=batch.y)
            loss = loss + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def patched_run(*, groups: bool = False, **settings: Any) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Model, EMA and optimizer of a host that trained with an aligner."""
    model = NormedSiT()
    HostAligner(**{**TINY, **settings}).attach(model)
    ema = copy.deepcopy(model)
    parameters: Any = model.parameters()
    if groups:
        named = list(parameters)
        parameters = [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:]}]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    train(model, optimizer)
    return model, ema, optimizer


def checkpoint_of(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As the hosts save it."""
    return {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="SiT-XL/2", proj_coeff=0.5, report_to=None),
        "steps": STEPS,
    }


def save(path: Path, checkpoint: dict[str, Any]) -> Path:
    torch.save(checkpoint, path)
    return path


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.fixture
def run() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    return patched_run()


@pytest.fixture
def source(run: tuple[nn.Module, nn.Module, torch.optim.Optimizer], tmp_path: Path) -> Path:
    return save(tmp_path / "0000003.pt", checkpoint_of(*run))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Nothing but it may be new in its folder."""
    folder = tmp_path / "exported"
    folder.mkdir()
    yield folder / "plain.pt"
    assert {path.name for path in folder.iterdir()} <= {"plain.pt", "plain.safetensors"}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_the_exported_model_and_ema_load_strictly_bit_for_bit(run: tuple, source: Path, out: Path) -> None:
    model, ema, _ = run
    removed = export_checkpoint(source, out)
    assert removed == len(model.vrpo.state_dict()) > 0
    exported, plain = load(out), NormedSiT()
    for part, trained in {"model": model, "ema": ema}.items():
        plain.load_state_dict(exported[part], strict=True)
        host = {key: value for key, value in trained.state_dict().items() if not key.startswith("vrpo")}
        assert_same(plain.state_dict(), host)
        assert isinstance(exported[part], OrderedDict)
        assert exported[part]._metadata == NormedSiT().state_dict()._metadata


def test_the_rest_of_the_checkpoint_stays(source: Path, out: Path) -> None:
    export_checkpoint(source, out)
    before, after = load(source), load(out)
    assert list(after) == list(before)
    assert (after["args"], after["steps"]) == (before["args"], before["steps"])


@pytest.mark.parametrize("groups", [False, True])
def test_the_exported_optimizer_goes_on_in_the_plain_model(groups: bool, tmp_path: Path, out: Path) -> None:
    model, ema, optimizer = patched_run(groups=groups)
    export_checkpoint(save(tmp_path / "0000003.pt", checkpoint_of(model, ema, optimizer)), out)
    exported, plain = load(out), NormedSiT()
    plain.load_state_dict(exported["model"])
    parameters: Any = list(plain.parameters())
    if groups:
        parameters = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    plain_optimizer = torch.optim.AdamW(parameters, lr=7.0)
    plain_optimizer.load_state_dict(exported["opt"])
    host = {name: p for name, p in model.named_parameters() if not name.startswith("vrpo")}
    assert [group["lr"] for group in plain_optimizer.param_groups] == [1e-3] * (1 + groups)
    for (name, parameter), (plain_name, mine) in zip(host.items(), plain.named_parameters(), strict=True):
        assert name == plain_name
        assert_same(optimizer.state[parameter], plain_optimizer.state[mine])
    # The same step on both, of the host's own loss: the plain model goes on as the patched one would.
    model.vrpo.detach(model)
    train(model, optimizer, steps=2, first=STEPS)
    train(plain, plain_optimizer, steps=2, first=STEPS)
    assert_same(plain.state_dict(), model.state_dict())


def test_the_exported_optimizer_is_the_plain_hosts_kind(tmp_path: Path, out: Path) -> None:
    """The run asked for a fused one; the unpatched host did not."""
    model, ema, optimizer = patched_run()
    make_fused(optimizer)
    source = save(tmp_path / "c.pt", checkpoint_of(model, ema, optimizer))
    assert load(source)["opt"]["param_groups"][0]["fused"] is True
    export_checkpoint(source, out)
    plain = torch.optim.AdamW(NormedSiT().parameters())
    plain.load_state_dict(load(out)["opt"])
    assert [group["fused"] for group in plain.param_groups] == [None]
    export_checkpoint(out, tmp_path / "again.pt")  # it holds no aligner: it is the host's own, whatever its kind
    assert load(tmp_path / "again.pt")["opt"]["param_groups"] == load(out)["opt"]["param_groups"]


def test_safetensors_holds_the_ema_alone(run: tuple, source: Path, out: Path) -> None:
    _, ema, _ = run
    path = out.with_suffix(".safetensors")
    export_checkpoint(source, path)
    weights = load_file(path)
    assert_same(dict(sorted(weights.items())), dict(sorted(ema.state_dict().items())))
    NormedSiT().load_state_dict(weights, strict=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_shared_and_strided_and_odd_tensors_keep_their_bits(suffix: str, tmp_path: Path, out: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    odd = {
        "shared": base,
        "rows": base[1],
        "columns": base.t(),
        "half": torch.tensor([1.5, float("nan"), float("-inf")], dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "none": torch.empty(0, 2),
    }
    source = save(tmp_path / "c.pt", {"model": odd, "ema": odd})
    assert export_checkpoint(source, out.with_suffix(suffix)) == 0
    found = load(out)["ema"] if suffix == ".pt" else load_file(out.with_suffix(suffix))
    assert found.keys() == odd.keys()
    for key, value in odd.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].nan_to_num(7), value.nan_to_num(7))


def contrast(state: RewardState) -> Tensor:
    return state.x0_hat.flatten(1).std(1)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"features": "host"},
    {"features": "none"},
    {"reward_coeff": 0.0},
    {"layers": "all", "projector": "conv"},
    {"rewards": {"contrast": contrast}},
    {"reward_weights": {"semantic": 1, "perceptual": 2}},
    {"own_projectors": False},
    {"target_dims": (12, 6)},
]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.module.", "module._orig_mod."])
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_parameters_are_told_from_buffers_by_name(settings: dict[str, Any], prefix: str) -> None:
    model = NormedSiT()
    HostAligner(**{**TINY, **settings}).attach(model)
    parameters = {prefix + name for name, _ in model.named_parameters() if name.startswith("vrpo.")}
    keys = [prefix + key for key in model.state_dict()]
    assert {key for key in keys if is_aligner_parameter(key)} == parameters
    assert not any(is_aligner_parameter(prefix + key) for key in NormedSiT().state_dict())


@pytest.mark.parametrize(
    "key", ["vrpo", "my_vrpo.weight", "blocks.0.vrpo.weight", "vrpo_head.weight", "xmodule.vrpo.a"]
)
def test_a_host_s_own_similar_name_stays(key: str) -> None:
    assert not is_aligner_parameter(key)
    plain, removed = without_aligner({"model": {key: torch.ones(1)}, "ema": {key: torch.ones(1)}}, "c")
    assert removed == 0 and [*plain["model"], *plain["ema"]] == [key, key]


def test_keys_behind_ddp_and_compile_and_an_ema_that_holds_the_aligner(run: tuple, tmp_path: Path, out: Path) -> None:
    model, *_ = run
    checkpoint = checkpoint_of(*run)
    for part, prefix in {"model": "module.module.", "ema": "module._orig_mod."}.items():
        checkpoint[part] = {prefix + key: value for key, value in model.state_dict().items()}
    export_checkpoint(save(tmp_path / "c.pt", checkpoint), out)
    exported = load(out)
    host = [key for key in model.state_dict() if not key.startswith("vrpo.")]
    assert list(exported["model"]) == ["module.module." + key for key in host]
    assert list(exported["ema"]) == ["module._orig_mod." + key for key in host]
    count = sum(not name.startswith("vrpo.") for name, _ in model.named_parameters())
    assert exported["opt"]["param_groups"][0]["params"] == list(range(count)) == list(exported["opt"]["state"])


def test_a_frozen_critic_has_no_state_and_is_counted_all_the_same(tmp_path: Path, out: Path) -> None:
    model, ema, optimizer = patched_run()
    state = optimizer.state_dict()
    for index in [*state["state"]][-4:]:
        del state["state"][index]
    checkpoint = {**checkpoint_of(model, ema, optimizer), "opt": state}
    export_checkpoint(save(tmp_path / "c.pt", checkpoint), out)
    plain = NormedSiT()
    torch.optim.AdamW(plain.parameters()).load_state_dict(load(out)["opt"])


def test_a_checkpoint_without_an_aligner_stays_as_it_is(tmp_path: Path, out: Path) -> None:
    model = NormedSiT()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    source = save(tmp_path / "c.pt", checkpoint_of(model, copy.deepcopy(model), optimizer))
    assert export_checkpoint(source, out) == 0
    before, after = load(source), load(out)
    assert before["opt"]["param_groups"] == after["opt"]["param_groups"]
    assert_same(before["model"], after["model"])
    for index, state in before["opt"]["state"].items():
        assert_same(state, after["opt"]["state"][index])


# Refusals


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, out: Path) -> None:
    exploded = tmp_path / "exploded"
    plain = {"model": {}, "ema": {}, "args": Bomb(exploded)}
    pickle.loads(pickle.dumps(plain))
    assert exploded.exists()  # the bomb is live
    exploded.rmdir()
    for legacy in (False, True):
        path = tmp_path / f"bomb{legacy}.pt"
        torch.save(plain, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            CheckpointError, match=f"{path.name}: expected a checkpoint, got a pickle that calls .*mkdir"
        ):
            export_checkpoint(path, out)
        assert not exploded.exists() and not out.exists()


@pytest.mark.parametrize("already", [False, True])
def test_namespace_is_allowed_while_reading_and_then_as_before(already: bool, source: Path, out: Path) -> None:
    before = {*torch.serialization.get_safe_globals()}
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*(before - {argparse.Namespace}), *([argparse.Namespace] * already)])
    try:
        export_checkpoint(source, out)
        assert (argparse.Namespace in torch.serialization.get_safe_globals()) == already
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*before])


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.ones(1).expand(1 << 46), torch.ones(3, device="meta")],
    ids=["sparse", "larger than memory", "without memory"],
)
def test_a_tensor_that_safetensors_cannot_hold(tensor: torch.Tensor, tmp_path: Path, out: Path) -> None:
    torch.save({"model": {}, "ema": {"a": tensor}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: ema: expected tensors that safetensors holds") as caught:
        export_checkpoint(tmp_path / "c.pt", out.with_suffix(".safetensors"))
    assert "\n" not in str(caught.value) and not out.with_suffix(".safetensors").exists()


def test_versions_of_layers_that_are_none(tmp_path: Path, out: Path) -> None:
    weights = OrderedDict(a=torch.ones(1))
    weights._metadata = [1]  # type: ignore[attr-defined]
    torch.save({"model": {}, "ema": weights}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="expected 'model' and 'ema', two mappings of tensors"):
        export_checkpoint(tmp_path / "c.pt", out)


def test_a_name_that_is_too_long(source: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a file that can be written"):
        export_checkpoint(source, out.with_name("a" * 300 + ".pt"))


@pytest.mark.filterwarnings("error")
def test_an_odd_protocol_is_no_second_line(tmp_path: Path, out: Path) -> None:
    torch.save({"model": {}, "ema": {}}, tmp_path / "c.pt", pickle_protocol=3)
    assert export_checkpoint(tmp_path / "c.pt", out) == 0


def test_missing_file(tmp_path: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: expected a checkpoint, got .*No such file"):
        export_checkpoint(tmp_path / "none.pt", out)
    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        export_checkpoint(tmp_path, out)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated_file(kept: float, source: Path, out: Path) -> None:
    data = source.read_bytes()
    source.write_bytes(data[: int(kept * len(data)) if kept in (0.5, 0.99) else int(kept)])
    with pytest.raises(CheckpointError, match=r"0000003\.pt: expected a checkpoint") as caught:
        export_checkpoint(source, out)
    assert "\n" not in str(caught.value) and not out.exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [1],
        {"model": {}},
        {"model": {}, "ema": 1},
        {"model": {"a": 1}, "ema": {}},
        {"model": {1: torch.ones(1)}, "ema": {}},
        {"blocks.0.weight": torch.ones(1)},
    ],
    ids=repr,
)
def test_another_kind_of_file(content: object, tmp_path: Path, out: Path) -> None:
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: expected 'model' and 'ema', two mappings of tensors, got"):
        export_checkpoint(tmp_path / "c.pt", out)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)])
def test_no_checkpoint_at_all(content: bytes, tmp_path: Path, out: Path) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"c\.pt: expected "):
        export_checkpoint(tmp_path / "c.pt", out)


def _foreign(state: dict[str, Any], kind: str) -> Any:
    if kind == "another order":
        order = state["state"]
        indices = sorted(order)
        return {**state, "state": {a: order[b] for a, b in zip(indices, reversed(indices), strict=True)}}
    if kind == "too few":
        return {**state, "param_groups": [{**state["param_groups"][0], "params": [0, 1]}]}
    return {"no groups": {"state": {}}, "empty": {"state": {}, "param_groups": []}, "no mapping": [1]}[kind]


@pytest.mark.parametrize("kind", ["another order", "too few", "no groups", "empty", "no mapping"])
def test_an_optimizer_of_another_model_is_refused(kind: str, run: tuple, tmp_path: Path, out: Path) -> None:
    checkpoint = checkpoint_of(*run)
    checkpoint["opt"] = _foreign(checkpoint["opt"], kind)
    with pytest.raises(CheckpointError, match=r"c\.pt: opt: expected AdamW's state"):
        export_checkpoint(save(tmp_path / "c.pt", checkpoint), out)
    assert not out.exists()


def test_an_existing_file_is_replaced_only_when_asked(source: Path, out: Path) -> None:
    out.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="expected no such file, got one that exists"):
        export_checkpoint(source, out)
    assert out.read_bytes() == b"old"
    export_checkpoint(source, out, overwrite=True)
    assert load(out)["steps"] == STEPS


@pytest.mark.parametrize("link", ["itself", "symlink", "hardlink", "other spelling"])
def test_the_checkpoint_itself_is_never_replaced(link: str, source: Path, out: Path) -> None:
    target = source
    if link == "symlink":
        out.symlink_to(source)
        target = out
    elif link == "hardlink":
        out.hardlink_to(source)
        target = out
    elif link == "other spelling":
        target = out.parent / ".." / source.name
    before = source.read_bytes()
    with pytest.raises(CheckpointError, match="expected another file than the checkpoint"):
        export_checkpoint(source, target, overwrite=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["plain", "plain.bin", "plain.pth"])
def test_another_ending_is_refused(name: str, source: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a file ending in \.pt or \.safetensors"):
        export_checkpoint(source, out.with_name(name))


def test_a_folder_in_its_place_or_none_around_it(source: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match="a file that can be written"):
        export_checkpoint(source, out / "plain.pt")
    out.mkdir()
    with pytest.raises(CheckpointError, match="Give the name of a file"):
        export_checkpoint(source, out, overwrite=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    error: Exception, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: object, file: Any) -> None:
        file.write(b"half")
        raise error

    out.write_bytes(b"old")
    monkeypatch.setattr(module.torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"expected a file that can be written, got .*"):
        export_checkpoint(source, out, overwrite=True)
    assert out.read_bytes() == b"old"


def test_the_new_file_has_its_name_only_when_it_is_on_disk(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, original = [], (module.os.fsync, module.os.replace)
    monkeypatch.setattr(module.os, "fsync", lambda fd: (events.append("fsync"), original[0](fd)))
    monkeypatch.setattr(module.os, "replace", lambda a, b: (events.append(("replace", b)), original[1](a, b)))
    export_checkpoint(source, out)
    assert events == ["fsync", ("replace", out), "fsync"], "the last is the folder's, in which the name stands"


def test_others_may_read_the_new_file_as_they_may_any_other(source: Path, out: Path) -> None:
    export_checkpoint(source, out)
    assert out.stat().st_mode == source.stat().st_mode


def test_export_leaves_the_checkpoint_alone(source: Path, out: Path) -> None:
    before = source.read_bytes()
    export_checkpoint(source, out)
    export_checkpoint(source, out.with_suffix(".safetensors"))
    assert source.read_bytes() == before
