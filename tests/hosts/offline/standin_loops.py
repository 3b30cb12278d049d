"""What would make a loop slow or impossible here: previews, 82,783 images, a package that a host's folder hides."""

import functools
import os
from types import ModuleType

CAPTIONED_IMAGES = 82783  # MSCOCO256Features asserts this number


def short_preview(module: ModuleType) -> None:
    """Some hosts draw 64 images in 50 steps at step 1; $VRPO_TEST_PREVIEW_STEPS asks for fewer steps."""
    steps = os.environ.get("VRPO_TEST_PREVIEW_STEPS")
    if not steps:
        return
    original = module.euler_sampler

    @functools.wraps(original)
    def euler_sampler(*args, **kwargs):
        return original(*args, **(kwargs | {"num_steps": int(steps)}))

    module.euler_sampler = euler_sampler


def few_captioned_images(module: ModuleType) -> None:
    """The few files that there are, again and again."""
    if not hasattr(module, "MSCOCOFeatureDataset"):
        return
    cls = module.MSCOCOFeatureDataset
    original = cls.__getitem__
    cls.__len__ = lambda self: CAPTIONED_IMAGES
    cls.__getitem__ = lambda self, index: original(self, index % self.num_data)


def no_datasets_package(module: ModuleType) -> None:
    """LightningDiT's own folder ``datasets`` hides the package of that name, which accelerate would import."""
    if os.environ.get("VRPO_TEST_NO_DATASETS") == "1":
        module.is_datasets_available = lambda: False
