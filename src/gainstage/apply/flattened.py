"""Parameters that FSDP1 has flattened into one and cut into equal runs, by their original names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gainstage.apply.box import run_boxes
from gainstage.apply.parts import Holding, join, without_wrappers


def flattened_holdings(module: Any, path: str) -> dict[str, Holding]:
    """What this process holds of the parameters that one ``FullyShardedDataParallel`` manages.

    Args:
        module: the wrapper.
        path: its name in the model.
    """
    handle = module._handle
    if handle is None:
        return {}
    flat = handle.flat_param
    if handle.uses_sharded_strategy and not handle.is_sharded(flat):
        handle.reshard(free_unsharded_flat_param=True)
    memory = vars(flat).get("_local_shard", flat.detach())  # set at the first forward pass
    ranks = frozenset(torch.distributed.get_process_group_ranks(handle.process_group))
    aliases: dict[str, list[str]] = {}
    for shared in flat._shared_param_infos:
        first = join(shared.prim_module_name, shared.prim_param_name)
        aliases.setdefault(first, []).append(join(path, without_wrappers(join(shared.module_name, shared.param_name))))
    found = {}
    for info, shape, held in zip(flat._param_infos, flat._shapes, flat._shard_param_infos, strict=True):
        name = join(info.module_name, info.param_name)
        start, count = (held.offset_in_shard, held.numel_in_shard) if held.in_shard else (0, 0)
        found[join(path, without_wrappers(name))] = Holding(
            shape=tuple(shape),
            dtype=flat.dtype,
            aliases=tuple(aliases.get(name, ())),
            parameter=flat,
            memory=memory.narrow(0, start, count),
            boxes=tuple(run_boxes(shape, held.intra_param_start_idx, held.intra_param_end_idx + 1)) if count else (),
            ranks=ranks,
        )
    return found


def flat_views(module: Any) -> Iterator[torch.Tensor]:
    """The tensors under which the modules show the flattened parameters; not parameters of their own."""
    if module._handle is None:
        return
    flat = module._handle.flat_param
    yield flat
    for info in (*flat._param_infos, *flat._shared_param_infos):
        view = info.module._parameters.get(info.param_name)
        if view is not None:
            yield view
