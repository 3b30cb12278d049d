"""The networks and the training runs of a convergence benchmark; both are kept, and only made where missing."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_options import FREE_ON_RESUME, TrainOptions, parse_options, to_dict
from train_repa_vrpo import main as train_example

from convergence.networks import PretrainedNetwork, load_pretrained
from convergence.recipe import JUDGES, OUTPUT, Recipe
from vrpo_plugin import VRPOConfig
from vrpo_plugin.config import check_keys
from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.files import write_file
from vrpo_plugin.standalone.cache_features import CacheSettings, cache_features
from vrpo_plugin.standalone.feature_cache import FeatureCache
from vrpo_plugin.standalone.small_network import SmallFeatureNetwork, load_small_features
from vrpo_plugin.standalone.small_training import (
    train_denoising_features,
    train_rotation_features,
    train_small_features,
)
from vrpo_plugin.standalone.sources import Source, all_images, open_source
from vrpo_plugin.standalone.train_critic import CriticTraining, train_critic

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_repa_vrpo.py"
ENCODER = "encoder"

# Another architecture and other seeds than the encoder's; two of the three have never seen a label.
TRAINERS: dict[str, Callable[..., SmallFeatureNetwork]] = {
    ENCODER: lambda images, labels, **kw: train_small_features(images, labels, seed=0, architecture="residual", **kw),
    "classes": lambda images, labels, **kw: train_small_features(images, labels, seed=1, architecture="plain", **kw),
    "rotation": lambda images, labels, **kw: train_rotation_features(images, seed=2, architecture="plain", **kw),
    "denoising": lambda images, labels, **kw: train_denoising_features(images, seed=3, architecture="plain", **kw),
}


@dataclass(frozen=True)
class Benchmark:
    """A recipe with its data and its folder of networks and runs."""

    recipe: Recipe
    data: Path | None
    output: Path

    @property
    def training_data(self) -> Path | None:
        """``DATA/train`` or ``DATA/train.npz`` where one exists, else ``DATA``; None: the digits."""
        return self._part("train") or self.data

    def _part(self, *names: str) -> Path | None:
        """The first folder or array file of these names in ``DATA``."""
        paths = [self.data / file for name in names for file in (name, f"{name}.npz")] if self.data else []
        return next((path for path in paths if path.exists()), None)

    def source(self) -> Source:
        """The training images."""
        return open_source(self.training_data, self.recipe.resolution)

    def held_out(self) -> Tensor:
        """Validation images uint8 (N, C, H, W), of ``DATA``'s test or val; else training images."""
        found = self._part("test", "val") or self.training_data
        return all_images(open_source(found, self.recipe.resolution), self.recipe.evaluation.held_out)[0]

    def unseen(self, count: int) -> Tensor | None:
        """So many images uint8 (N, C, H, W) of ``DATA``'s test or val; None where there are fewer, or neither."""
        found = self._part("test", "val")
        source = open_source(found, self.recipe.resolution) if found else None
        return all_images(source, count)[0] if source is not None and len(source) >= count else None

    def network_file(self, name: str) -> Path:
        """Where a network is kept."""
        return self.output / "networks" / f"{name}.safetensors"

    @property
    def pretrained_encoder(self) -> str | None:
        """Its name; None where the encoder is a small network that is trained here."""
        return self.recipe.networks.encoder.get("name")

    @property
    def trained_here(self) -> tuple[str, ...]:
        """Small networks that this benchmark trains."""
        return JUDGES if self.pretrained_encoder else (ENCODER, *JUDGES)

    @property
    def features(self) -> Path:
        """Where a pretrained encoder's tokens of the training images are kept."""
        return self.output / "features"

    def network(self, name: str) -> SmallFeatureNetwork | PretrainedNetwork:
        """A network that :meth:`train_networks` made, or a pretrained one."""
        side = max(1, self.recipe.resolution // 2)  # of the tokens of a patch-2 transformer, in pixel space
        if name == ENCODER and self.pretrained_encoder:
            chosen, grid = self.pretrained_encoder, (side, side)
        elif name in self.recipe.networks.pretrained:
            chosen, grid = name, None
        else:
            return load_small_features(self.network_file(name))
        return load_pretrained(chosen, self.network_file(chosen), resolution=self.recipe.resolution, token_grid=grid)

    def train_networks(self, device: torch.device) -> dict[str, float | None]:
        """Trains the encoder, the judges and the critics that are missing, on that device; stores tokens.

        Returns:
            The accuracy of encoder and judges on images held out, each in its own task; None of a pretrained one.

        Raises:
            ConfigError: one is there that was trained with other settings.
            WeightsNotFoundError: a pretrained one is not there.
        """
        # Before any training.
        found = {name: self.network(name) for name in self.recipe.networks.pretrained}
        if self.pretrained_encoder:
            found[ENCODER] = self.network(ENCODER)
        for name in (*self.trained_here, *self.recipe.networks.critics):
            self._claim_network(name)
        missing = [name for name in self.trained_here if not self.network_file(name).exists()]
        if missing:
            images, labels = all_images(self.source(), self.recipe.networks.images)
        for name in missing:
            network = TRAINERS[name](images, labels, device=device, **self._network_settings(name))
            network.save(self.network_file(name))
        if self.pretrained_encoder:
            cache_features(self._caching(self.pretrained_encoder))
        for name in self.recipe.networks.critics:
            if not self.network_file(name).exists():
                train_critic(self.critic_training(name))
        found |= {name: self.network(name) for name in self.trained_here}
        return {name: network.accuracy for name, network in found.items()}

    def _caching(self, encoder: str) -> CacheSettings:
        return CacheSettings(
            data=str(self.training_data),
            output=str(self.features),
            encoder=encoder,
            encoder_checkpoint=str(self.network_file(encoder)),
            resolution=self.recipe.resolution,
            pca=self.recipe.networks.encoder.get("pca", 0),
            flips=self.recipe.training.get("flip_prob", 0) > 0,
            num_workers=self.recipe.training.get("num_workers", 0),
        )

    def encoder_options(self) -> dict[str, Any]:
        """Where a run and a critic's training have the aligned encoder from."""
        if self.pretrained_encoder:
            return {"enc_type": self.pretrained_encoder, "features_dir": str(self.features)}
        return {"enc_type": "small", "enc_checkpoint": str(self.network_file(ENCODER))}

    def _network_settings(self, name: str) -> Mapping[str, Any]:
        networks = self.recipe.networks
        if name in networks.critics:
            return networks.critics[name]
        return networks.encoder if name == ENCODER else networks.judges

    def _claim_network(self, name: str) -> None:
        """Writes down what a network is trained with, before it is; refuses one that was trained otherwise."""
        settings: dict[str, Any] = {"settings": dict(self._network_settings(name))}
        settings |= {"data": self.source().fingerprint(), "images": self.recipe.networks.images}
        if name in self.recipe.networks.critics:
            settings["encoder"] = dict(self.recipe.networks.encoder)
        file = self.network_file(name).with_suffix(".json")
        if self.network_file(name).exists():
            former = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            refuse_other(self.network_file(name), former, settings, "Choose another --output.")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(settings, indent=1) + "\n")

    def critic_training(self, name: str) -> CriticTraining:
        """How a critic of the recipe is trained."""
        given: dict[str, Any] = {
            "output": str(self.network_file(name)),
            "data_dir": str(self.training_data) if self.training_data else None,
            "resolution": self.recipe.resolution,
            **self.encoder_options(),
            "num_workers": self.recipe.training.get("num_workers", 0),
        }
        settings = self.recipe.networks.critics[name]
        own = {f.name for f in fields(CriticTraining)} - given.keys()
        check_keys(settings, own, subject=f"recipe {self.recipe.name}: networks: critics: {name}")
        return CriticTraining(**given, **settings)


@dataclass(frozen=True)
class Run:
    """One method at one seed."""

    benchmark: Benchmark
    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """The example's folder of this run."""
        return self.benchmark.output / "runs" / f"{self.method}-seed{self.seed}"

    def arguments(self) -> list[str]:
        """The example's command line."""
        recipe = self.benchmark.recipe
        steps = recipe.evaluation.steps
        options: dict[str, Any] = {
            **recipe.training,
            **recipe.methods[self.method],
            "resolution": recipe.resolution,
            "seed": self.seed,
            "output_dir": self.folder.parent,
            "exp_name": self.folder.name,
            **self.benchmark.encoder_options(),
            "max_train_steps": steps[-1],
            "checkpointing_steps": steps[0],
            "sampling_steps": 0,
            "eval_samples": 0,
        }
        if self.benchmark.training_data is not None:
            options["data_dir"] = self.benchmark.training_data
        if isinstance(critic := options.get("critic_checkpoint"), str):
            options["critic_checkpoint"] = critic.replace(OUTPUT, str(self.benchmark.output), 1)
        words = [word for key, value in options.items() for word in _flag(key, value)]
        return [*words, "--resume"]

    def settings(self) -> dict[str, Any]:
        """What of the recipe makes a step of this method, without the paths of a machine."""
        recipe = self.benchmark.recipe
        own = {"resolution": recipe.resolution, "networks": recipe.to_dict()["networks"]}
        return {**own, **recipe.training, **recipe.methods[self.method]}

    def judging(self) -> dict[str, Any]:
        """What a point of the record depends on, besides its step and guidance."""
        evaluation = asdict(self.benchmark.recipe.evaluation)
        judges = {name: self.benchmark.network(name).name for name in self.benchmark.recipe.judges}
        return {key: value for key, value in evaluation.items() if key not in ("steps", "guidance")} | judges

    def check(self) -> None:
        """Refuses what an earlier recipe left under this name.

        Raises:
            ConfigError: the run was trained, or judged, with other settings.
        """
        recorded = self.folder / "config.json"
        if recorded.exists():
            now = to_dict(*self.options()) | {"data_fingerprint": self.benchmark.source().fingerprint()}
            if self.benchmark.pretrained_encoder:
                now["stored_features"] = FeatureCache(self.benchmark.features).identity.digest()
            then = json.loads(recorded.read_text(encoding="utf-8"))["settings"]
            refuse_other(self.folder, _trained(then), _trained(now), "Choose another --output.")
        if self.record_file.exists():
            do = "Delete this file to judge the run again, or choose another --output."
            refuse_other(self.record_file, self.record().get("judging", {}), self.judging(), do)

    def options(self) -> tuple[TrainOptions, VRPOConfig]:
        """The same, parsed."""
        return parse_options(self.arguments())

    def train(self, launch: str = "") -> None:
        """Trains, or goes on; what the example prints goes to a file beside the run's folder.

        Args:
            launch: options of ``accelerate launch``; without them the example runs in this process.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f"{self.folder.name}.log").open("a", encoding="utf-8") as log:
            if launch:
                command = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(launch), str(SCRIPT)]
                subprocess.run([*command, *self.arguments()], check=True, stdout=log, stderr=log)
                return
            with redirect_stdout(log), redirect_stderr(log):
                train_example(self.arguments())

    def _checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"{step:07d}"

    @property
    def is_trained(self) -> bool:
        """Its last checkpoint is there."""
        return self._checkpoint(self.benchmark.recipe.evaluation.steps[-1]).is_dir()

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of an evaluated step."""
        found = self._checkpoint(step)
        if not found.is_dir():
            got = sorted(path.name for path in found.parent.glob("0*"))
            do = "Choose evaluation steps that are multiples of the first one."
            raise DataError(str(found), expected="a checkpoint", got=got, do=do)
        return found

    @property
    def record_file(self) -> Path:
        """Where the evaluation is kept."""
        return self.folder / "convergence.json"

    def record(self) -> dict[str, Any]:
        """What was evaluated so far: ``{"method", "seed", "judging", "points": [...]}``."""
        if self.record_file.exists():
            return json.loads(self.record_file.read_text(encoding="utf-8"))
        return {"method": self.method, "seed": self.seed, "judging": self.judging(), "points": []}

    def trained_steps(self) -> int:
        """Steps that the log holds, for the progress bar."""
        log = self.folder / "metrics.jsonl"
        return sum(1 for _ in log.open("rb")) if log.exists() else 0


def refuse_other(subject: Path, former: Mapping[str, Any], now: Mapping[str, Any], do: str) -> None:
    """Compares the settings that something was made with to those of now.

    Raises:
        ConfigError: they differ; the text names each difference.
    """
    keys = [key for key in {**former, **now} if former.get(key) != now.get(key)]
    if keys:
        then, wanted = ({key: of.get(key) for key in keys} for of in (former, now))
        raise ConfigError(str(subject), expected=wanted, got=f"{then}, from an earlier recipe", do=do)


def _trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that move a trained number; of a critic's file its name, as the folder may have been moved."""
    kept = {key: value for key, value in settings.items() if key not in FREE_ON_RESUME}
    kept["critic_checkpoint"] = Path(kept.get("critic_checkpoint") or "").name
    return json.loads(json.dumps(kept))


def _flag(key: str, value: Any) -> list[str]:
    """One option, as the example's command line takes it."""
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name if value else "--no-" + key.replace("_", "-")]
    if isinstance(value, Mapping):
        return [name, ",".join(f"{k}={v}" for k, v in value.items())]
    if isinstance(value, (list, tuple)):
        return [name, ",".join(map(str, value))]
    return [name, str(value)]
