from kernels.linear_kl import linear_kl
from kernels.linear_logp import linear_logp

__all__ = ["linear_kl", "linear_logp"]
