"""Does a step wait for the device? Counted by ``torch.cuda.set_sync_debug_mode``.

The example's loop runs under ``error``: one wait ends it. REPA's and SiT's own code waits by itself (REPA draws its
times on the CPU), so there the waits of patched and unpatched steps are counted, and traced to the line that asked for
them: none may be in this package.
"""

import multiprocessing
import sys
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import vrpo_plugin
from gpu_stages.example import example_trainer
from gpu_stages.stage import Stage, markdown
from gpu_stages.step import TOY
from gpu_stages.trainers import Size, Trainer, variants, write_critic

STEPS = 20
PACKAGE = str(Path(vrpo_plugin.__file__).parent)
# Frames that stand between a wait and the line that asked for it.
NOT_A_CAUSE = (__file__, warnings.__file__, str(Path(torch.__file__).parent))
PRECISIONS = ("no", "bf16", "fp16")


def run(stage: Stage) -> str:
    """The example's loop, patched REPA, patched SiT."""
    if not stage.cuda:
        stage.skip("waits", "needs CUDA; the loops are run without being watched")
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        stage.keep(rows=rows)
        print(row, flush=True)

    hosts = _start_hosts(stage)  # they take as long to start as the example
    for precision in PRECISIONS:
        if precision == "fp16" and not stage.cuda:
            stage.skip("example, fp16", "needs CUDA")
            continue
        stage.attempt(f"example, {precision}", lambda p=precision: add(_example(stage, p)))
    for title, process in hosts.items():
        stage.attempt(title, lambda t=title, p=process: add({"loop": t, **p.answer()}))
    return table(rows)


def _start_hosts(stage: Stage) -> dict[str, "HostProcess"]:
    found = {}
    for name in ("REPA", "SiT"):
        if stage.hosts is None or not (stage.hosts / name).is_dir():
            stage.skip(f"patched {name}", f"no {name} in --hosts")
            continue
        for patched in (False, True):
            title = f"{name}, {'patched' if patched else 'as it is'}"
            found[title] = HostProcess(
                name, stage.hosts, stage.scratch / f"{name}-{patched}", patched, stage.device, stage.toy
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """One row per loop."""
    head = ["loop", "steps", "waits a step", "of them in vrpo_plugin"]
    shown = [[row["loop"], str(row["steps"]), f"{row['waits'] / row['steps']:g}", str(row["ours"])] for row in rows]
    return markdown(head, shown)


@contextmanager
def watching(mode: str, enabled: bool) -> Iterator[None]:
    """Sets torch's mode for a while; nothing where there is no GPU."""
    if enabled:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if enabled:
            torch.cuda.set_sync_debug_mode("default")


def _example(stage: Stage, precision: str) -> dict[str, Any]:
    steps = STEPS if stage.cuda else 3
    with example_trainer(stage, f"sync-{precision}", mixed_precision=precision, max_train_steps=steps + 3) as trainer:
        loader = trainer.batches()
        for _ in range(3):
            trainer.advance(loader)
        with watching("error", stage.cuda):
            for _ in range(steps):
                trainer.advance(loader)
    return {"loop": f"the example, {precision}", "steps": steps, "waits": 0, "ours": 0, "mode": "error"}


class HostProcess:
    """A host in a process of its own: a patch is for good."""

    def __init__(self, host: str, hosts: Path, scratch: Path, patched: bool, device: torch.device, toy: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, host, hosts, scratch, patched, device, toy))
        self.process.start()
        there.close()

    def answer(self) -> dict[str, Any]:
        """What it counted.

        Raises:
            RuntimeError: it failed; the text is its traceback.
        """
        try:
            answer = self.connection.recv()
        except EOFError:
            answer = "its process ended without a word"
        self.process.join(10)
        self.process.kill()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def _serve(
    connection: Any, host: str, hosts: Path, scratch: Path, patched: bool, device: torch.device, toy: bool
) -> None:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        make = {"REPA": _repa_step, "SiT": _sit_step}[host]
        connection.send(_count(make(hosts / host, scratch, patched, device, toy), device))
    except Exception:
        connection.send(traceback.format_exc())


def _count(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Waits of 20 steps, the lines that asked for them, and how many of these are in this package."""
    steps = STEPS if device.type == "cuda" else 2
    for _ in range(3):
        step()
    places: Counter[str] = Counter()
    ours = 0

    def note(message: Any, category: type[Warning], *_: Any) -> None:
        nonlocal ours
        if "synchroniz" not in str(message):
            return
        frame = next(f for f in reversed(traceback.extract_stack()) if not f.filename.startswith(NOT_A_CAUSE))
        places[f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"] += 1
        ours += frame.filename.startswith(PACKAGE)

    with warnings.catch_warnings(), watching("warn", device.type == "cuda"):
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # for this block; catch_warnings puts it back
        for _ in range(steps):
            step()
    return {"steps": steps, "waits": places.total(), "ours": ours, "places": dict(places), "mode": "warn"}


def _repa_step(root: Path, scratch: Path, patched: bool, device: torch.device, toy: bool) -> Callable[[], None]:
    size = TOY if toy else Size("SiT-S/2", 16)
    critic = write_critic(scratch / f"critic-{size.latent}-{size.dim}.safetensors", size)
    return Trainer(size, variants(critic)["VRPO, online critic" if patched else "REPA"], root, device).step


def _sit_step(root: Path, scratch: Path, patched: bool, device: torch.device, toy: bool) -> Callable[[], None]:
    """SiT's loss and model; its VAE, which is not here, is a stand-in that averages pixels."""
    import timm
    from safetensors.torch import save_file

    side = 16 if toy else 32

    class AutoencoderKL:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(torch.cat([x, x[:, :1]], 1), 8)

    diffusers = types.ModuleType("diffusers")
    diffusers.models = types.ModuleType("diffusers.models")  # type: ignore[attr-defined]
    diffusers.models.AutoencoderKL = AutoencoderKL  # type: ignore[attr-defined]
    sys.modules |= {"diffusers": diffusers, "diffusers.models": diffusers.models}  # type: ignore[attr-defined]
    sys.path.insert(0, str(root))
    if patched:
        encoder, weights = "vit_tiny_patch16_224", scratch / "vit_tiny.safetensors"
        save_file(timm.create_model(encoder).state_dict(), weights)
        vrpo_plugin.apply_vrpo_to_sit(
            encoder=encoder, encoder_checkpoint=str(weights), reward_release_steps=1000, critic_width=64
        )
    from models import SiT  # type: ignore[import-not-found]
    from transport import create_transport  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = SiT(input_size=side, hidden_size=128, depth=6, num_heads=4, patch_size=2, num_classes=10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    transport, vae = create_transport(), AutoencoderKL()
    images = torch.rand(8, 3, 8 * side, 8 * side, device=device) * 2 - 1
    y = torch.arange(8, device=device)
    model.train()

    def step() -> None:
        with torch.no_grad():
            x = vae.encode(images)
        loss = transport.training_losses(model, x, {"y": y})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
