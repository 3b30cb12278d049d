"""Trains a SiT with VRPO, REPA, iREPA or no alignment.

``accelerate launch examples/train_repa_vrpo.py`` trains on scikit-learn's digits in minutes on a CPU;
``--config examples/recipes/imagenet256_sit_xl2.yaml --data-dir ...`` trains on a cluster.
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from torch.distributed.tensor import DTensor
from train_options import FREE_ON_RESUME, TrainOptions, parse_options, to_dict
from train_parts import (
    Painter,
    TrainingStep,
    build_decoder,
    build_loader,
    build_model,
    build_optimizer,
    build_targets,
    check_data,
    check_launch,
    check_tools,
    describe,
    describe_targets,
    open_features,
    save_guide,
    use_deterministic_kernels,
)

from vrpo_plugin import NonFiniteGuard, VRPOConfig, VRPOError
from vrpo_plugin.standalone.held_out import watch_rewards
from vrpo_plugin.standalone.phases import Phase, Remarks, describe_source, say, summary
from vrpo_plugin.standalone.progress import progress
from vrpo_plugin.standalone.run_folder import MetricBuffer, RunFolder, SkippedSteps, as_option
from vrpo_plugin.standalone.sources import Source, open_source
from vrpo_plugin.standalone.stopping import Agreement, StopSignals
from vrpo_plugin.standalone.targets import SMALL
from vrpo_plugin.standalone.training import (
    build_ema,
    ema_decay,
    load_states,
    parameter_groups,
    update_ema,
    whole_states,
)


class Trainer:
    """One run: builds the parts, resumes, trains, writes.

    Args:
        options: resolved options.
        config: resolved objective.
        accelerator: from ``accelerate launch``.
    """

    def __init__(self, options: TrainOptions, config: VRPOConfig, accelerator: Accelerator) -> None:
        self.options, self.config, self.accelerator = options, config, accelerator
        device = accelerator.device
        main = accelerator.is_main_process
        with Phase("data", enabled=main) as phase:
            self.source: Source = open_source(options.data_dir, options.resolution)
            phase.made = describe_source(self.source)
        check_data(options, config, self.source, accelerator.num_processes)
        aligned = config.features == "policy" or config.reward_coeff > 0
        self.features = open_features(options, self.source) if aligned else None
        stored = None if self.features is None else self.features.identity.digest()
        self.folder = RunFolder(
            Path(options.output_dir) / options.run_name,
            {**to_dict(options, config), "data_fingerprint": self.source.fingerprint(), "stored_features": stored},
            free=FREE_ON_RESUME,
            resume=options.resume,
            resume_step=options.resume_step,
            keep_last=options.keep_last,
        )
        decode = build_decoder(options, self.source, device)
        accelerator.wait_for_everyone()  # every process has looked before the first one writes
        targets = None
        if aligned:
            with Phase("targets", enabled=main) as phase:
                targets = build_targets(options, config, self.source, self.features, self.folder.path, accelerator)
                phase.made = describe_targets(options, config, targets)
        self.encode = targets.encode if targets else lambda images: ()
        with Phase("model", enabled=main) as phase:
            self.model = build_model(options, config, self.source, targets).to(device)
            phase.made = describe(options, config, self.model)
        self.ema = build_ema(self.model)
        step_module = TrainingStep(self.model, config.path_type)
        optimizer = build_optimizer(options, self.model)
        self.step_module, self.optimizer = accelerator.prepare(step_module, optimizer)
        self.clip_groups = parameter_groups(self.model)
        self.guard = NonFiniteGuard(self.optimizer.optimizer, self.model, scaler=accelerator.scaler)
        self.painter = Painter(options, config, self.source, decode, device) if decode else None
        if self.painter is not None and main:
            with Phase(
                "evaluation network", enabled=bool(options.eval_samples) and options.eval_network != SMALL
            ) as phase:
                self.painter.load_network()
                phase.made = options.eval_network
        self.watch = None
        if config.targets == "encoder" and self.features is None:  # it looks at the encoder's tokens
            self.watch = watch_rewards(self.folder.path, self.model, self.encode, self.source, decode, config.path_type)
        self.signals = StopSignals(say=main)
        rank, processes = accelerator.process_index, accelerator.num_processes
        self.remarks = Remarks(self.source, "data" if processes == 1 else f"data (process {rank})")
        self.skipped = SkippedSteps(options.max_skipped_steps)
        self.step = 0

    def resume(self) -> None:
        """Loads the newest complete checkpoint of this run, if there is one."""
        found = self.folder.latest()
        if found is None:
            if self.options.resume and self.accelerator.is_main_process:
                self.folder.cut_metrics(0)  # of a run that was killed before its first checkpoint
            return
        tensors, state = found
        self.ema.load_state_dict(tensors["ema"])
        load_states(self.model, self.optimizer.optimizer, tensors)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if self.accelerator.is_main_process:
            self.folder.cut_metrics(self.step)
        self.accelerator.print(f"resumed from step {self.step}")
        if self.step >= self.options.max_train_steps:
            schedule = as_option("reward_release_steps", self.config.reward_release_steps)
            longer = f"--resume {schedule} --max-train-steps MORE"
            self.accelerator.print(f"all steps are made already; {longer} makes the run longer, on its old schedule")

    def save(self) -> None:
        """Writes a checkpoint of all that the next step depends on; randomness depends on the step alone."""
        self._flush()
        tensors = whole_states(self.model, self.optimizer.optimizer)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            scalars = {"step": self.step, "scaler": None if scaler is None else scaler.state_dict()}
            self.folder.save(self.step, {**tensors, "ema": self.ema.state_dict()}, scalars)
        self.accelerator.wait_for_everyone()

    def train(self) -> bool:
        """Trains up to ``max_train_steps``; the last step always gets a grid and a checkpoint.

        Returns:
            False where a signal stopped it: the step that was being made has a checkpoint.
        """
        options = self.options
        if self.accelerator.is_main_process:
            self.folder.start()
        self.agreement = Agreement(self.accelerator, self.signals, every=options.flush_steps, step=self.step)
        self.metrics = MetricBuffer(self.agreement)
        loader = iter(build_loader(options, self.config, self.source, self.accelerator, self.step, self.features))
        self.step_module.train()
        self.bar = progress(
            options.max_train_steps,
            options.run_name,
            unit="step",
            initial=self.step,
            enabled=self.accelerator.is_local_main_process,
        )
        with self.signals:
            self._steps(loader)
        self.bar.close()
        self.remarks.say_new(all_of_them=True)
        if self.agreement.stop and (self.step < options.max_train_steps or options.eval_samples):
            self.accelerator.print(self.signals.message(self.step))
            return False
        self.signals.release()
        if self.accelerator.is_main_process:
            save_guide(self.model, self.folder.path)
        if options.eval_samples:
            self._evaluate()
        self.accelerator.wait_for_everyone()
        return True

    def _steps(self, loader: Any) -> None:
        options = self.options
        started = time.perf_counter()
        while self.step < options.max_train_steps and not self.agreement.stop:
            metrics = self._train_step(loader)
            self.step += 1
            now = time.perf_counter()
            self.metrics.add(self.step, metrics, now - started)
            started = now
            self.bar.update()
            last = self.step == options.max_train_steps
            draws = bool(options.sampling_steps) and (self.step % options.sampling_steps == 0 or last)
            saves = self.step % options.checkpointing_steps == 0 or last
            if draws or saves or self.agreement.due(self.step):
                self._flush()
            if draws and not self.agreement.stop:
                self._draw()
            if saves or self.agreement.stop:
                self.save()

    def _train_step(self, loader: Any) -> dict[str, Tensor]:
        accelerator, micro_steps = self.accelerator, self.options.gradient_accumulation_steps
        collected: dict[str, Tensor] = {}
        self.guard.keep()
        for micro_step in range(micro_steps):
            batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in next(loader).items()}
            synchronize = micro_step == micro_steps - 1
            with torch.no_grad(), accelerator.autocast():
                stored = batch.pop("features", None)
                z = self.encode(batch["image"]) if self.features is None else self.features.decode(stored)
            with nullcontext() if synchronize else accelerator.no_sync(self.step_module):
                loss, metrics = self.step_module(batch, z, self.step)
                accelerator.backward(loss / micro_steps)
            for name, value in metrics.items():
                collected[name] = collected[name] + value / micro_steps if micro_step else value / micro_steps
        main, critic = self.clip_groups
        norms = {"grad_norm": accelerator.clip_grad_norm_(main, self.options.max_grad_norm)}
        if critic:
            norms["grad_norm_critic"] = torch.nn.utils.clip_grad_norm_(critic, self.options.max_grad_norm)
        collected |= {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in norms.items()}
        counts = [value for name, value in collected.items() if "nonfinite" in name]
        skipped = self.guard.check([collected[name] for name in norms], counts)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, ema_decay(self.options.ema_decay, self.step), skipped)
        return collected | {"skipped": skipped}

    def _flush(self) -> None:
        rows = self.metrics.flush()
        if rows and self.accelerator.is_main_process:
            self.folder.append_metrics(rows)
        self.remarks.say_new()
        self.skipped.add(rows)
        if not rows or not self.accelerator.is_main_process:
            return
        for row in rows:
            numbers = {k: v for k, v in row.items() if k != "step" and v is not None}
            self.accelerator.log(numbers, step=row["step"])
        shown = {k.removeprefix("vrpo/reward/"): v for k, v in rows[-1].items() if k == "loss" or "reward/" in k}
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items() if v is not None}, refresh=False)

    def _draw(self) -> None:
        self._flush()
        if self.painter is not None:
            self.painter.grid(self.ema, self.folder.path / "samples" / f"{self.step:07d}.png")
            if self.accelerator.is_main_process:
                if self.watch is not None:
                    self.accelerator.log(self.watch.look(self.ema, self.step), step=self.step)
                self.folder.draw_curves()
        self.accelerator.wait_for_everyone()

    def _evaluate(self) -> None:
        assert self.painter is not None  # build_decoder has refused otherwise
        result = self.painter.evaluate(self.ema, self.folder.path)
        if result is None:
            return
        self.folder.write_evaluation(result)
        print(
            f"{self.options.method}: Frechet distance {result.frechet_distance:.3f}, "
            f"precision {result.precision:.3f}, recall {result.recall:.3f} "
            f"({result.protocol.name}, network {result.protocol.feature_network})"
        )


def main(argv: list[str] | None = None) -> None:
    """Runs the example; errors of the user's making end it with one line."""
    try:
        options, config = parse_options(argv)
        if options.deterministic:
            use_deterministic_kernels()
        check_tools(options)
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            log_with=None if options.report_to == "none" else options.report_to,
            project_config=ProjectConfiguration(project_dir=str(Path(options.output_dir) / options.run_name)),
        )
        check_launch(accelerator)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.allow_tf32
        trainer = Trainer(options, config, accelerator)
        if options.report_to != "none":
            flat = {k: v for k, v in to_dict(options, config).items() if isinstance(v, (str, int, float, bool))}
            accelerator.init_trackers("vrpo-plugin", config=flat)
        trainer.resume()
        finished = trainer.train()
        accelerator.end_training()
        if finished and accelerator.is_main_process:
            for line in summary(trainer.folder.path):
                say(line)
        if not finished:
            sys.exit(trainer.signals.exit_status)
    except VRPOError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
