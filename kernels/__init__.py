from kernels.linear_kl import linear_kl, linear_logp

__all__ = ["linear_kl", "linear_logp"]
