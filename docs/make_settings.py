"""Writes docs/settings.md from the docstrings of the settings: python docs/make_settings.py > docs/settings.md"""

import re
import sys

from vrpo_plugin.config import VRPOConfig, describe_fields

# Words in brackets in the docstrings, and the sections that they name.
SECTIONS = {
    "ablations": "results.md#ablations-cifar16_ablations",
    "floor": "results.md#the-main-comparison-cifar16_floor-two-seeds-6000-steps",
    "schedule": "results.md#how-the-settings-were-chosen",
    "settings": "results.md#how-the-settings-were-chosen",
}
HEAD = """# Settings

<!-- Made by: python docs/make_settings.py > docs/settings.md -->

Every setting of the objective is a field of `VRPOConfig`, and has the same name everywhere:

| where | how |
|---|---|
| your own loop | `VRPOAligner(..., reward_coeff=0.08)` or `VRPOAligner(..., config=VRPOConfig(reward_coeff=0.08))` |
| the launcher | `accelerate launch -m vrpo_plugin.launch --vrpo-reward-coeff 0.08 train.py ...` |
| one line in a host | `vrpo_plugin.apply_vrpo_to_repa(reward_coeff=0.08)` |
| the environment | `VRPO_REWARD_COEFF=0.08` |
| a YAML or JSON file for a host | `reward_coeff: 0.08`, named by `--vrpo-config FILE` or `VRPO_CONFIG` |
| the example trainer | `--reward-coeff 0.08`, or `reward_coeff: 0.08` in a recipe |

An unknown name is an error that names the nearest one.

Settings that only concern hosts (encoder, compatibility, logging) are in [hosts.md](hosts.md#settings).

The Frechet distances below (class features, lower is better) were measured on CIFAR-10 at 16 px. Those that link to the
main comparison are of this version, after 6,000 steps and with two seeds. The others are of version 0.1, one seed where
no other number is given; differences below 0.1 are noise."""


def markdown(text: str) -> str:
    """A docstring's text, with links."""
    text = re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text.replace("``", "`"))
    return re.sub(r"\[(\w+)\]", lambda word: f"([{word[1]}]({SECTIONS[word[1]]}))", text)


def entry(name: str, text: str) -> list[str]:
    """One setting: default, what it does, when to change it, what was measured."""
    what, when, measured = re.fullmatch(r"(.*?) When: (.*?) (Measured: .*|Not measured.*)", text).groups()
    default = repr(getattr(VRPOConfig, name)).replace("'", '"')
    return [
        f"### `{name}`",
        "",
        f"Default: `{default}`. {markdown(what)}",
        "",
        f"- **When to change it**: {markdown(when)}",
        f"- {markdown(measured.replace('Measured:', '**Measured**:', 1))}",
        "",
    ]


def page() -> str:
    """The whole page."""
    lines = [HEAD, ""]
    for title, entries in describe_fields(VRPOConfig).items():
        lines += [f"## {title}", ""]
        for name, text in entries.items():
            lines += entry(name, text)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
