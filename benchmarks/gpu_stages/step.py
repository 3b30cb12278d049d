"""Step time and peak memory: SiT without alignment, REPA, VRPO; eager and compiled; with and without an encoder.

Each variant lives in a process of its own, so that a patch is applied once, and its peak memory is its own. Blocks of
steps of all of them take turns; ratios are taken within a turn.
"""

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpu_stages.profiling import profile_kernels
from gpu_stages.stage import Stage, cpu_count, markdown
from gpu_stages.trainers import Size, Trainer, variants, write_critic

REPEATS = 5
BLOCK_SECONDS = 0.5  # of one block of steps
TOY = Size("SiT-Ti/2", 4, (4, 16, 16), "vit_tiny_patch16_224", 128, 128, 192, bf16=False)
ALL = ("none", "REPA", "VRPO, features only", "VRPO, frozen critic", "VRPO, targets=critic", "VRPO, online critic")
WITH_ENCODER = ("REPA", "VRPO, frozen critic", "VRPO, online critic")


@dataclass(frozen=True)
class Group:
    """Variants whose blocks take turns.

    Attributes:
        title: of the table.
        size: of the steps.
        names: of the variants.
        encoded: those of them that are also timed with the encoder in the step.
        compiled: see :class:`Trainer`.
    """

    title: str
    size: Size
    names: tuple[str, ...]
    encoded: tuple[str, ...] = ()
    compiled: bool = False


def groups(toy: bool) -> list[Group]:
    """What is measured, the most wanted first. Of XL/2 no more than three variants fit on one card."""
    if toy:
        return [
            Group("toy", TOY, ("none", "REPA", "VRPO, frozen critic"), ("REPA",)),
            Group("toy, compiled", TOY, ("REPA", "VRPO, online critic"), compiled=True),
        ]
    base, large = Size("SiT-B/2", 64), Size("SiT-XL/2", 32)
    return [
        Group("SiT-B/2", base, ALL, WITH_ENCODER),
        Group("SiT-XL/2", large, ("REPA", "VRPO, frozen critic", "VRPO, online critic"), WITH_ENCODER),
        Group("SiT-XL/2, no alignment", large, ("REPA", "none", "VRPO, features only")),
        Group("SiT-B/2, compiled", base, ("none", "REPA", "VRPO, frozen critic", "VRPO, online critic"), (), True),
    ]


def run(stage: Stage, titles: Sequence[str] = ()) -> str:
    """All groups, or those of these titles, as far as the time lasts; a markdown table each."""
    repa = stage.hosts / "REPA" if stage.hosts else None
    if repa is None:
        stage.skip("REPA's own code", "no --hosts; the rows named REPA are our own loop with REPA's loss")
    tables, results = [], []
    for group in groups(stage.toy):
        if titles and group.title not in titles:
            continue
        # Starting the processes takes half a minute, compiling them a minute.
        if stage.left < (5 if stage.toy else 70 if group.compiled else 45):
            stage.skip(group.title, f"{stage.left:.0f} s left")
            continue
        rows = stage.attempt(group.title, lambda group=group: measure(group, repa, stage))
        if rows is not None:
            group_record = {"title": group.title, **asdict(group.size), "compiled": group.compiled, "rows": rows}
            results.append({**group_record, "measured": stage.stamp})
            stage.keep(groups=results)
            tables.append(f"{describe(group)}\n\n{table(rows)}")
            print(tables[-1] + "\n", flush=True)
    return "\n\n".join(tables)


def describe(group: Group) -> str:
    """The sizes, in a line."""
    size = group.size
    return (
        f"{group.title}: batch {size.batch_size}, {size.tokens} tokens x {size.dim}, {'bf16' if size.bf16 else 'fp32'}"
    )


def measure(group: Group, repa: Path | None, stage: Stage) -> list[dict[str, Any]]:
    """One row per variant, and per variant with the encoder: times of all turns, and peak memory."""
    critic = write_critic(stage.scratch / f"critic-{group.size.latent}-{group.size.dim}.safetensors", group.size)
    workers = {name: Worker(group, name, critic, repa, stage.device) for name in group.names}
    try:
        # Together: what is slow is the start of the processes, and compiling.
        for name, worker in workers.items():
            worker.send(("build", name in group.encoded))
        for worker in workers.values():
            worker.receive()
        entries = [(name, False) for name in group.names] + [(name, True) for name in group.encoded]
        if group.compiled:
            for worker in workers.values():
                worker.send(("run", 1, False))
            for worker in workers.values():
                worker.receive()
        blocks: dict[tuple[str, bool], int] = {}
        for entry in entries:
            seconds = workers[entry[0]].ask(("run", 2, entry[1]))["seconds"]
            blocks[entry] = 1 if stage.toy else max(2, min(30, round(BLOCK_SECONDS / seconds)))
        measured: dict[tuple[str, bool], list[dict[str, Any]]] = {entry: [] for entry in entries}
        for turn in range(2 if stage.toy else REPEATS):
            if turn >= 2 and stage.left < 10:
                break
            for name, encode in entries:
                measured[name, encode].append(workers[name].ask(("run", blocks[name, encode], encode)))
        # Operator calls of a CPU are no kernels; a toy counts them, so that this line is run.
        profiled = entries if stage.cuda or stage.toy else []
        kernels = {entry: workers[entry[0]].ask(("profile", entry[1])) for entry in profiled if stage.left > 5}
    finally:
        for worker in workers.values():
            worker.stop()
    return [
        {
            "variant": name,
            "encoder": encode,
            "steps": blocks[name, encode],
            "seconds": [result["seconds"] for result in results],
            "peak_bytes": max(result["peak_bytes"] for result in results),
            "kernels": kernels.get((name, encode)),
        }
        for (name, encode), results in measured.items()
    ]


class Worker:
    """One variant in a process of its own, which runs steps when it is told to."""

    def __init__(self, group: Group, name: str, critic: Path, repa: Path | None, device: torch.device) -> None:
        # Not forked: a process that has used CUDA cannot be.
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, other = context.Pipe()
        arguments = (other, group.size, name, critic, repa, device, group.compiled)
        self.process = context.Process(target=_serve, args=arguments, daemon=False)
        self.process.start()
        other.close()

    def send(self, command: tuple[Any, ...]) -> None:
        self.connection.send(command)

    def receive(self) -> Any:
        """The answer.

        Raises:
            RuntimeError: the process failed; the text is its traceback.
        """
        try:
            answer = self.connection.recv()
        except EOFError:
            answer = "its process ended without a word"
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def ask(self, command: tuple[Any, ...]) -> Any:
        self.send(command)
        return self.receive()

    def stop(self) -> None:
        self.connection.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


def _serve(
    connection: Connection, size: Size, name: str, critic: Path, repa: Path | None, device: torch.device, compiled: bool
) -> None:
    trainer: Trainer | None = None
    while True:
        try:
            command, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if command == "profile":
                assert trainer is not None  # built first
                connection.send(_kernels(trainer, *arguments))
            elif command == "build":
                torch.set_num_threads(max(1, cpu_count() // 2))
                trainer = Trainer(size, variants(critic)[name], repa, device, compiled=compiled)
                if arguments[0]:
                    trainer.use_encoder()
                connection.send({})
            else:
                assert trainer is not None  # built first
                connection.send(_block(trainer, *arguments))
        except Exception:
            connection.send(traceback.format_exc())
            return


def _block(trainer: Trainer, steps: int, encode: bool) -> dict[str, Any]:
    """A step that is not timed, and then as many that are."""
    trainer.step(encode=encode)
    if trainer.device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(steps):
            trainer.step(encode=encode)
        return {"seconds": (time.perf_counter() - begin) / steps, "peak_bytes": peak_resident_bytes()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(steps):
        trainer.step(encode=encode)
    last.record()
    torch.cuda.synchronize()
    result = {"seconds": first.elapsed_time(last) / 1e3 / steps, "peak_bytes": torch.cuda.max_memory_allocated()}
    torch.cuda.empty_cache()  # for the other processes on this card
    return result


def _kernels(trainer: Trainer, encode: bool) -> dict[str, Any]:
    cuda = trainer.device.type == "cuda"
    trainer.step(encode=encode)
    counted = profile_kernels(lambda: trainer.step(encode=encode), 2 if cuda else 1, cuda=cuda)
    if cuda:
        torch.cuda.empty_cache()
    return {"calls": counted["calls"], "milliseconds": counted["milliseconds"]}


def peak_resident_bytes() -> int:
    """Of this process. Linux' ru_maxrss would start with the peak of the process that started this one."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def ratios(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[float]:
    """Time of a row over that of another, turn by turn."""
    return [mine / theirs for mine, theirs in zip(row["seconds"], base["seconds"], strict=True)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times and memory, as ratios to REPA and to no alignment, both without the encoder.

    *kernels*: time of all kernels of a step; where *ms* is more, the step waits for the host's launches.
    """
    bases = {name: row for name in ("REPA", "none") for row in rows if row["variant"] == name and not row["encoder"]}
    head = ["step", "ms", *(f"time / {base} (min .. max)" for base in bases), "peak MiB"]
    head += [f"memory / {base}" for base in bases]
    profiled = all(row.get("kernels") for row in rows)
    head += ["kernels, ms", *(f"kernels / {base}" for base in bases), "number"] if profiled else []
    cells = []
    for row in rows:
        name = row["variant"] + (" + encoder" if row["encoder"] else "")
        line = [name, f"{statistics.median(row['seconds']) * 1e3:.1f}"]
        for base in bases.values():
            found = ratios(row, base)
            line.append(f"{statistics.median(found):.3f} ({min(found):.3f} .. {max(found):.3f})")
        line.append(f"{row['peak_bytes'] / 2**20:.0f}")
        line += [f"{row['peak_bytes'] / base['peak_bytes']:.3f}" for base in bases.values()]
        if profiled:
            own = row["kernels"]["milliseconds"]
            line.append(f"{own:.1f}")
            line += [f"{own / base['kernels']['milliseconds']:.3f}" for base in bases.values()]
            line.append(f"{row['kernels']['calls']:.0f}")
        cells.append(line)
    return markdown(head, cells)
