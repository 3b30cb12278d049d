"""One run of a convergence benchmark: trains it, and judges its checkpoints. ``__main__.py`` starts these."""

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from train_parts import Painter, build_decoder, build_model

from convergence.networks import PretrainedNetwork
from convergence.parts import ENCODER, Benchmark, Run
from convergence.recipe import read_recipe
from vrpo_plugin.encoders import Targets
from vrpo_plugin.files import write_file
from vrpo_plugin.functional.interpolant import clean_estimate, noisy_sample
from vrpo_plugin.standalone.checkpoint import load_checkpoint
from vrpo_plugin.standalone.features import extract_features
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance
from vrpo_plugin.standalone.precision_recall import precision_recall
from vrpo_plugin.standalone.small_network import SmallFeatureNetwork
from vrpo_plugin.standalone.sources import all_images

SAMPLING_SEED = 1  # of the noise, the same for all methods, seeds and steps
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the validation losses


class Judge:
    """Judges models of a benchmark's runs.

    Args:
        benchmark: its networks are there.
        device: where to sample.
    """

    def __init__(self, benchmark: Benchmark, device: torch.device) -> None:
        self.benchmark, self.device = benchmark, device
        self.recipe = benchmark.recipe.evaluation
        self.source = benchmark.source()
        self.networks = {name: benchmark.network(name).to(device) for name in benchmark.recipe.judges}
        self.real = {name: self._reference(name) for name in self.networks}
        self.encoder = benchmark.network(ENCODER).to(device)
        self.held_out = benchmark.held_out().to(device)

    def _reference(self, name: str) -> Tensor:
        """A judge's features of real images, which all runs of the benchmark share."""
        file = self.benchmark.network_file(f"{name}.reference")
        of = [self.networks[name].name, self.source.fingerprint(), self.recipe.reference]
        if file.exists():
            with safe_open(file, "pt") as stored:
                if json.loads(stored.metadata()["of"]) == of:
                    return stored.get_tensor("features")
        features = extract_features(self.networks[name], all_images(self.source, self.recipe.reference)[0])
        write_file(file, save({"features": features}, metadata={"of": json.dumps(of)}))
        return features

    def floor(self) -> dict[str, dict[str, float]] | None:
        """What as many real images as samples get, of a split that no reference is from; None where there is none."""
        images = self.benchmark.unseen(self.recipe.samples)
        if images is None:
            return None
        return {n: self._distances(n, extract_features(network, images)) for n, network in self.networks.items()}

    def judge(
        self, run: Run, step: int, guidance: float, ema: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """One point: distances, precision and recall in every judge; at guidance 1 the validation losses too.

        Args:
            run: whose settings built the model.
            step: of the weights.
            guidance: scale.
            ema: the averaged weights, which are sampled.
            state: the trained weights with their aligner.
        """
        self.options, self.config = run.options()
        model = build_model(self.options, self.config, self.source, None).to(self.device)
        model.load_state_dict(ema)
        options = replace(
            self.options,
            cfg_scale=guidance,
            solver=self.recipe.solver,
            solver_steps=self.recipe.solver_steps,
        )
        decode = build_decoder(options, self.source, self.device)
        assert decode is not None  # pixels
        painter = Painter(options, self.config, self.source, decode, self.device)
        # Many small kernels a step: a GPU is as quick with more images.
        batch_size = 1000 if self.device.type == "cuda" else 256
        with self._precision():
            images = painter.images(model, self.recipe.samples, SAMPLING_SEED, batch_size)
        point: dict[str, Any] = {"step": step, "guidance": guidance, "judges": {}}
        for name, network in self.networks.items():
            point["judges"][name] = self._distances(name, extract_features(network, images))
        if guidance == 1:
            point |= self._validate(model)
            point |= self._watch(state)
        return point

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def _distances(self, name: str, generated: Tensor) -> dict[str, float]:
        real = self.real[name]
        distance = frechet_distance(FeatureStatistics.from_features(real), FeatureStatistics.from_features(generated))
        # As many real images as generated ones: both sides have neighbourhoods of one size.
        neighbourhoods = precision_recall(evenly_spaced(real, len(generated)).to(self.device), generated)
        return {"fd": distance, "precision": neighbourhoods.precision, "recall": neighbourhoods.recall}

    def _noisy(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(x_t, target, t) of the held-out images at each of the times, with the same noise on every call."""
        x0 = self.held_out.float() / 127.5 - 1
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SAMPLING_SEED)).to(x0)
        times = [torch.full((len(x0),), t, device=x0.device) for t in TIMES]
        return [(*noisy_sample(x0, noise, t, self.config.path_type), t) for t in times]

    @torch.no_grad()
    def _validate(self, model: torch.nn.Module) -> dict[str, Any]:
        """Denoising loss of the EMA on held-out images, unconditional, and the held-out reward of its estimates."""
        model.eval()
        null = torch.full((len(self.held_out),), self.source.num_classes, device=self.device)
        losses, rewards = [], []
        names = list(self.networks)
        judges = list(self.networks.values())
        clean = [judge.tokens(self.held_out) for judge in judges]
        for x_t, target, t in self._noisy():
            velocity = model(x_t, t, null).float()
            losses.append((velocity - target).square().mean().item())
            seen = _pixels(clean_estimate(x_t, velocity, t, self.config.path_type))
            rewards.append([_agreement(judge, seen, z) for judge, z in zip(judges, clean, strict=True)])
        held_out = {name: statistics.mean(r[i] for r in rewards) for i, name in enumerate(names)}
        return {"denoising_loss": statistics.mean(losses), "held_out_reward": held_out}

    @torch.no_grad()
    def _watch(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The trained reward on the same images, of the trained weights and their critic."""
        if self.config.reward_coeff == 0:
            return {}
        targets = Targets((self.encoder.token_dim,), self.encoder.grid, lambda images: (self.encoder.tokens(images),))
        model = build_model(self.options, self.config, self.source, targets).to(self.device)
        model.load_state_dict(state)
        critic = model.vrpo.critic
        if critic is None:
            return {}
        model.eval()
        null = torch.full((len(self.held_out),), self.source.num_classes, device=self.device)
        z, rewards, encoded = self.encoder.tokens(self.held_out), [], []
        for x_t, _, t in self._noisy():
            x0_hat = clean_estimate(x_t, model(x_t, t, null).float(), t, self.config.path_type)
            tokens = critic(x0_hat).tokens[0]
            rewards.append(F.cosine_similarity(tokens, z, dim=-1).mean().item())
            encoded.append(_agreement(self.encoder, _pixels(x0_hat), z))
        return {"trained_reward": statistics.mean(rewards), "encoder_reward": statistics.mean(encoded)}


def evenly_spaced(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows over the whole length: images come class by class, the first ones are of one class."""
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // count]


def _pixels(x: Tensor) -> Tensor:
    return x.add(1).mul(127.5).round().clamp(0, 255).byte()


def _agreement(network: SmallFeatureNetwork | PretrainedNetwork, images: Tensor, z: Tensor) -> float:
    """Mean cosine of tokens around their mean over the data: without it all tokens point one way."""
    centre = rearrange(z, "b n d -> (b n) d").mean(0)
    return F.cosine_similarity(network.tokens(images) - centre, z - centre, dim=-1).mean().item()


def evaluate(run: Run, device: torch.device) -> None:
    """Adds the points that are missing to the run's record."""
    record = run.record()
    done = {(point["step"], point["guidance"]) for point in record["points"]}
    missing = [point for point in run.benchmark.recipe.evaluation.points() if point not in done]
    judge = Judge(run.benchmark, device) if missing else None
    for step, guidance in missing:
        assert judge is not None
        tensors, _ = load_checkpoint(run.checkpoint(step), device)
        record["points"].append(judge.judge(run, step, guidance, tensors["ema"], tensors["model"]))
        write_file(run.record_file, json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--launch", default="", help="options of accelerate launch")
    options = parser.parse_args()
    benchmark = Benchmark(read_recipe(options.recipe), options.data, options.output)
    run = Run(benchmark, options.method, options.seed)
    run.check()
    if not run.is_trained:
        run.train(options.launch)
    evaluate(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
