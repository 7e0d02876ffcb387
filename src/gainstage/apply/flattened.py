"""Parameters that FSDP1 has flattened into one and cut into equal runs, by their original names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

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
    reshard_flattened(module)
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
            group=handle.process_group if handle.uses_sharded_strategy else None,
        )
    return found


def reshard_flattened(module: Any) -> None:
    """Give back what was gathered for a pass."""
    handle = module._handle
    if handle is not None and handle.uses_sharded_strategy and not handle.is_sharded(handle.flat_param):
        handle.reshard(free_unsharded_flat_param=True)


def whole_on_meta(module: Any) -> dict[int, dict[str, nn.Parameter]]:
    """The parameters that one wrapper manages, whole and on the meta device: by identity of their module and by name in it."""
    if module._handle is None:
        return {}
    flat = module._handle.flat_param
    found: dict[int, dict[str, nn.Parameter]] = {}
    for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
        values = torch.empty(shape, dtype=flat.dtype, device="meta")
        found.setdefault(id(info.module), {})[info.param_name] = nn.Parameter(values, requires_grad=flat.requires_grad)
    for shared in flat._shared_param_infos:
        first = found[id(shared.prim_module)][shared.prim_param_name]
        found.setdefault(id(shared.module), {})[shared.param_name] = first
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
