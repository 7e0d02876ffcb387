"""Operations that become one: sets of nodes, and the graph in which each set is a single node."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Sequence

from gainstage.capture.regions.dataflow import Dataflow
from gainstage.graph import Node, Ref, Region, TensorMeta
from gainstage.graph.families import ATTENTION, CONTRACTIONS, LOOKUP, RECURRENT

MOST = 1000  # operations in a region: it is run for each sample
STOPS = CONTRACTIONS | LOOKUP | ATTENTION | RECURRENT  # whose results are draws of their own


def fuse(nodes: Sequence[Node], wanted: Collection[str], find: Callable[[Dataflow], list[set[str]]]) -> list[Node]:
    """The same graph, with one operation in the place of each region, which returns what others read and what is wanted.

    Args:
        nodes: a graph without writes, its constants computed.
        wanted: names that are wanted after it: outputs, and what modules return.
        find: the regions of a graph, disjoint. What lies between two operations of one is inside as well.
    """
    dataflow = Dataflow(nodes)
    regions = closed(dataflow, find(dataflow))
    if not regions:
        return list(nodes)
    home = {name: position for position, region in enumerate(regions) for name in region}
    inside: list[list[Node]] = [[] for _ in regions]
    read = set(wanted)
    for node in nodes:
        place = home.get(node.name)
        read.update(name for name in node.operands() if home.get(name) != place)
        if place is not None:
            inside[place].append(node)
    found = [node for node in nodes if node.name not in home]
    for each in inside:
        found += as_one(each, [node for node in each if node.name in read and not is_complex(node)])
    return in_order(found)


def is_complex(node: Node) -> bool:
    """Whether a result of a node is complex."""
    metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    return any(meta is not None and meta.dtype.is_complex for meta in metas)


def with_region(regions: Sequence[set[str]], region: set[str]) -> list[set[str]]:
    """Disjoint regions with one more: it is one with all that it meets, and stands last."""
    return [other for other in regions if not other & region] + [region.union(*(other for other in regions if other & region))]


def closed(dataflow: Dataflow, regions: list[set[str]]) -> list[set[str]]:
    """The regions, each with all on the way from one of its operations to another; those that meet are one."""
    while True:
        merged: list[set[str]] = []
        for region in regions:
            merged = with_region(merged, dataflow.between(region))
        if merged == regions:
            return regions
        regions = merged


def as_one(inside: Sequence[Node], results: Sequence[Node]) -> list[Node]:
    """One operation in the place of several, and its results under their old names."""
    names = {node.name for node in inside}
    operands = tuple(dict.fromkeys(name for node in inside for name in node.operands() if name not in names))
    op = Region(tuple(inside), operands, tuple(node.name for node in results))
    args = tuple(Ref(name) for name in operands)
    if len(results) == 1:
        return [dataclasses.replace(results[0], op=op, args=args, kwargs={})]
    metas = tuple(node.meta if isinstance(node.meta, TensorMeta) else None for node in results)
    whole = dataclasses.replace(inside[-1], name=f"{inside[-1].name}_region", op=op, args=args, kwargs={}, meta=metas)
    pieces = [
        dataclasses.replace(node, op=operator.getitem, args=(Ref(whole.name), position), kwargs={})
        for position, node in enumerate(results)
    ]
    return [whole, *pieces]


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """The nodes such that each reads earlier ones only, otherwise in the order given.

    As by going through the list again and again, each time taking what is ready: a node is taken in the pass of the last of its
    operands, or in the one after it where that operand stands behind the node.
    """
    place = {node.name: position for position, node in enumerate(nodes)}
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in {*node.operands()}:
            readers.setdefault(name, []).append(node)
    missing = {node.name: len({*node.operands()}) for node in nodes}
    taken = dict.fromkeys(missing, 0)
    ready = [node for node in nodes if not missing[node.name]]
    for node in ready:
        for reader in readers.get(node.name, ()):
            passes = taken[node.name] + (place[node.name] > place[reader.name])
            taken[reader.name] = max(taken[reader.name], passes)
            missing[reader.name] -= 1
            if not missing[reader.name]:
                ready.append(reader)
    assert len(ready) == len(nodes), "regions read each other"
    return sorted(nodes, key=lambda node: taken[node.name])
