import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from vrpo_plugin.errors import ConfigError, DataError
from vrpo_plugin.standalone.evaluate import (
    EvalProtocol,
    EvalResult,
    append_results,
    compare,
    evaluate,
    frechet_ratios,
    read_results,
)
from vrpo_plugin.standalone.features import train_small_features
from vrpo_plugin.standalone.frechet import FeatureStatistics, frechet_distance
from vrpo_plugin.standalone.precision_recall import precision_recall

PROTOCOL = EvalProtocol(
    solver="euler",
    num_steps=50,
    num_samples=2000,
    feature_network="small-plain-32-01234567",
    reference="cifar10/test",
    num_reference=10_000,
)
OTHER = {
    "solver": "heun",
    "num_steps": 25,
    "num_samples": 1000,
    "feature_network": "small-plain-32-76543210",
    "reference": "cifar10/train",
    "num_reference": 5000,
    "guidance_scale": 1.5,
    "guidance_interval": (0.0, 0.7),
    "ema": 0.999,
    "labels": "uniform",
    "seed": 1,
    "k": 5,
    "reference_hash": "0123456789abcdef",
    "reference_features": 1000,
    "kernel_subset_size": 500,
    "resolution": 32,
    "guide": '{"strength": 0.5}',
    "mixed_precision": "bf16",
}


def result(distance=3.0, precision=0.5, recall=0.25, **changes):
    return EvalResult(replace(PROTOCOL, **changes), distance, precision, recall)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "fd2k_euler50_cfg1.0"),
        ({"num_samples": 50_000, "solver": "sde", "num_steps": 250}, "fd50k_sde250_cfg1.0"),
        ({"num_samples": 1437, "guidance_scale": 2}, "fd1437_euler50_cfg2.0"),
        ({"num_samples": 800, "guidance_scale": 1.25}, "fd800_euler50_cfg1.25"),
        ({"guidance_interval": (0.25, 0.7)}, "fd2k_euler50_cfg1.0"),
        ({"guidance_scale": 1.5, "guidance_interval": (0.25, 0.7)}, "fd2k_euler50_cfg1.5_t0.25-0.7"),
    ],
)
def test_name(changes, name):
    assert replace(PROTOCOL, **changes).name == name


def test_out_of_range_values_are_refused():
    bad = {
        "num_steps": 0,
        "num_samples": 3,
        "num_reference": 3,
        "guidance_scale": -1,
        "guidance_interval": (0.8, 0.2),
        "ema": 9999,
        "k": 0,
    }
    for name, value in bad.items():
        with pytest.raises(ConfigError, match=f"^{name}: expected"):
            replace(PROTOCOL, **{name: value})


def test_json_round_trip():
    made = result(guidance_interval=(0.1, 0.9), ema=0.9999)
    text = made.to_json()
    assert EvalResult.from_json(text) == made
    assert json.loads(text)["protocol"] == made.protocol.to_dict()
    assert json.loads(text)["frechet_distance"] == 3.0


def test_from_json_refuses_other_text():
    without = json.loads(result().to_json())
    del without["protocol"]["solver"]
    for text in ("{", "[]", '{"recall": 1}', json.dumps(without)):
        with pytest.raises(ConfigError, match="to_json"):
            EvalResult.from_json(text)


def test_compare_like_with_like():
    difference = compare(result(8.5, 1.0, 0.5), result(3.5, 0.875, 0.75))
    assert difference == {"frechet_distance": -5.0, "precision": -0.125, "recall": 0.25}


def test_every_field_is_compared():
    assert {f.name for f in fields(EvalProtocol)} == OTHER.keys()
    for name, value in OTHER.items():
        with pytest.raises(ConfigError, match=rf"different {name} \([^)]") as caught:
            compare(result(), result(**{name: value}))
        named = re.findall(r"(\w+) \(", str(caught.value))
        assert named == [name]
    with pytest.raises(ConfigError, match="seed"):
        compare(result(), result(solver="heun", seed=3))


def test_what_only_one_of_two_measured_is_not_compared():
    both = replace(result(), kernel_distance=0.25), replace(result(), kernel_distance=0.5, inception_score=9.0)
    assert compare(*both)["kernel_distance"] == 0.25 and "inception_score" not in compare(*both)
    assert "recall" not in compare(replace(result(), recall=None), result())


def test_one_reference_may_have_two_names():
    here, there = (result(reference_hash="0123456789abcdef", reference=name) for name in ("/a/test", "/b/test"))
    assert compare(here, there)["recall"] == 0
    with pytest.raises(ConfigError, match="different reference "):
        compare(result(reference="/a/test"), result(reference="/b/test"))


def test_unknown_values_are_named_and_equal_only_to_each_other():
    known = {"solver": "unknown", "num_steps": None, "guidance_scale": None, "guidance_interval": None, "ema": None}
    unknown = result(**known, labels="unknown", seed=None, guide="unknown", num_reference=None)
    assert unknown.protocol.name == "fd2k_unknown"
    assert unknown.protocol.unknown == [*known, "labels", "seed", "guide", "mixed_precision"]
    assert result(mixed_precision="no").protocol.unknown == []
    assert EvalResult.from_json(unknown.to_json()) == unknown
    assert compare(unknown, unknown)["recall"] == 0
    with pytest.raises(ConfigError, match=r"different solver \(euler and unknown\), num_steps \(50 and None\)"):
        compare(result(), unknown)


def test_a_result_of_the_first_edition_is_read():
    former = {"solver": "euler", "num_steps": 50, "num_samples": 2000, "feature_network": "small-plain-32-01234567"}
    former |= {"reference": "training images 1", "num_reference": 10_000, "guidance_scale": 1.0, "ema": 0.999}
    former |= {"guidance_interval": [0.0, 1.0], "labels": "data", "seed": 1, "k": 3}
    text = json.dumps({"protocol": former, "frechet_distance": 3.0, "precision": 0.5, "recall": 0.25})
    read = EvalResult.from_json(text)
    assert read.metrics == {"frechet_distance": 3.0, "precision": 0.5, "recall": 0.25}
    assert read.protocol.resolution is None and read.origin == {}


def test_results_are_added_and_read_in_order(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    first, second = result(1.0), replace(result(2.0), origin={"step": 5})
    append_results(path, [first])
    before = path.read_bytes()
    append_results(path, [second, first])
    assert path.read_bytes().startswith(before)
    assert read_results(path) == [first, second, first]
    path.write_bytes(before.rstrip(b"\n"))  # a file that an editor closed without a line's end
    append_results(path, [second])
    assert read_results(path) == [first, second]
    (tmp_path / "evaluation.json").write_text(first.to_json() + "\n")
    assert read_results(tmp_path / "evaluation.json") == [first]


def test_other_files_are_not_read_as_results(tmp_path):
    with pytest.raises(ConfigError, match="a file of results"):
        read_results(tmp_path / "none.jsonl")
    for text in ("", "{", "{}\n{}", "1"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ConfigError, match="evaluation result"):
            read_results(tmp_path / "other")


def test_ratios_are_of_the_last_result_of_each_network():
    def of(network, distance, **changes):
        return result(distance, feature_network=network, **changes)

    baseline = [of("a", 9.0), of("b", 5.0), of("a", 4.0)]
    assert frechet_ratios(baseline, [of("a", 2.0), of("b", 10.0)]) == {"a": 0.5, "b": 2.0}
    with pytest.raises(ConfigError, match="different seed"):
        frechet_ratios(baseline, [of("a", 2.0, seed=3)])
    with pytest.raises(ConfigError, match="above 0 in c, got results of a, b"):
        frechet_ratios(baseline, [of("c", 2.0)])
    with pytest.raises(ConfigError, match="above 0"):
        frechet_ratios([of("a", 0.0)], [of("a", 2.0)])


@pytest.fixture(scope="module")
def setting():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (torch.from_numpy(data.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target)
    network = train_small_features(images, labels, seed=0, width=16, steps=60)
    protocol = replace(PROTOCOL, num_samples=800, num_reference=800, feature_network=network.name, reference="digits")
    return network, images, protocol


def test_evaluate_ties_the_measures_together(setting):
    network, images, protocol = setting
    real, generated = images[:800], images[900:1700].flip(-1)
    got = evaluate(network, real, generated.split(300), protocol)
    a, b = (FeatureStatistics.from_features(network(x)) for x in (real, generated))
    expected = precision_recall(network(real), network(generated), k=3)
    assert got.protocol == protocol
    assert got.frechet_distance == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert got.precision == pytest.approx(expected.precision, abs=0.01)
    assert got.recall == pytest.approx(expected.recall, abs=0.01)


def test_real_digits_beat_damaged_ones(setting):
    network, images, protocol = setting
    real, fresh = images[:800], images[900:1700]
    noise = torch.randint(-60, 61, fresh.shape, generator=torch.Generator().manual_seed(0))
    noisy = (fresh + noise).clamp(0, 255).to(torch.uint8)
    collapsed = fresh[:20].repeat(40, 1, 1, 1)
    good, noised, narrow = (evaluate(network, real, x, protocol) for x in (fresh, noisy, collapsed))
    assert good.frechet_distance < 0.5 * min(noised.frechet_distance, narrow.frechet_distance)
    assert good.precision > noised.precision
    assert good.recall > narrow.recall + 0.3
    assert compare(good, noised)["frechet_distance"] > 0


def test_evaluate_refuses_what_the_protocol_does_not_say(setting):
    network, images, protocol = setting
    with pytest.raises(ConfigError, match=r"'num_samples': 700"):
        evaluate(network, images[:800], images[:700], protocol)
    with pytest.raises(ConfigError, match=r"'num_reference': 700"):
        evaluate(network, images[:700], images[:800], protocol)
    with pytest.raises(ConfigError, match="another"):
        evaluate(network, images[:800], images[:800], replace(protocol, feature_network="another"))
    unnamed = evaluate(lambda x: network(x), images[:800], images[:800], replace(protocol, feature_network="mine"))
    assert unnamed.protocol.feature_network == "mine"


def test_k_comes_from_the_protocol(setting):
    network, images, protocol = setting
    real, generated = images[:800], images[900:1700].flip(-1)
    wide = evaluate(network, real, generated, replace(protocol, k=20))
    assert wide.precision > evaluate(network, real, generated, protocol).precision


def test_non_finite_features_are_refused(setting):
    _, images, protocol = setting
    with pytest.raises(DataError, match="finite"):
        evaluate(lambda x: torch.full((len(x), 4), np.nan), images[:800], images[:800], protocol)
