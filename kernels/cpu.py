"""
transformers' attention, faster on a CPU, where torch's kernel or its use is slow. Importing this
file is enough, as models.py does. The package itself does not import transformers, which looks for
a package of this name while it is being imported.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

plain = sdpa_attention.sdpa_attention_forward
plain_use_gqa = sdpa_attention.use_gqa_in_sdpa


def attention(module, query, key, value, *args, **kwargs):
    """In fp32 instead of bf16, whose backward takes a CPU three times as long. Masks are bool."""
    if value.dtype != torch.bfloat16 or not value.is_cpu:
        return plain(module, query, key, value, *args, **kwargs)
    wide = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = plain(module, *wide, *args, **kwargs)
    return output.bfloat16(), None


AttentionInterface.register("sdpa", attention)

# The heads of a group share keys and values. Under a mask, as in decoding, transformers copies them
# for each head, which a CPU's kernel does not need.
sdpa_attention.use_gqa_in_sdpa = (
    lambda mask, key, value: key.is_cpu or plain_use_gqa(mask, key, value))
