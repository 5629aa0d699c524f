"""A policy whose weights are sharded over two processes (FSDP2): value and gradient of one. Run by torchrun."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.hf.models import Policy

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

dist.init_process_group("gloo")
for tied in (False, True):
    torch.manual_seed(0)
    whole = Policy(LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **SHAPE)).double())
    sharded = copy.deepcopy(whole)
    for layer in sharded.lm.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    ids, mask = torch.randint(0, 64, (4, 2, 30)), torch.rand(4, 2, 30) > 0.4
    mask[..., :15], ids[:, 1, :15] = False, ids[:, 0, :15]
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    out, expected = sharded(ids[own], mask[own]), whole(ids, mask)
    torch.testing.assert_close(out, expected[own], atol=1e-12, rtol=0)
    (out**2).sum().backward()
    ((expected**2).sum() / 2).backward()  # gradients are averaged over processes
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, atol=1e-12, rtol=0)
    assert sharded._body.packs
    assert sharded._knows_head
dist.destroy_process_group()
