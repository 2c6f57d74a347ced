"""The losses from hidden states: `linear_kl` for distillation, `linear_logp` for RL and scoring."""

import os

# On a CPU torch keeps 1,024 compiled matrix products, each for one shape, and in bf16 each takes
# about a megabyte. Batches of text have ever new shapes, so a process grew by gigabytes. A step
# uses far fewer shapes again and again; these limits must stand before the first product.
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

from kernels.linear_kl import linear_kl  # noqa: E402
from kernels.linear_logp import linear_logp  # noqa: E402

__all__ = ["linear_kl", "linear_logp"]


def __getattr__(name):
    # There are no classes here. Where Hugging Face's package of this name is installed,
    # transformers looks for its classes and finds this folder first; its error would not say so.
    if name[0].isupper():
        raise ImportError(
            f"transformers wants {name} of Hugging Face's package `kernels`, but finds this "
            f"repository's folder of that name first: pip uninstall kernels"
        )
    raise AttributeError(name)
