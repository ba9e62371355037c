"""Changes to the graph of a unit's stage that leave the unit as it was."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from server.units import Unit


def copy_of(unit: Unit) -> fx.GraphModule:
    """Its stage with a graph of its own over the same modules.

    Args:
        unit: of a folded stage.
    """
    assert isinstance(unit.stage, fx.GraphModule)
    graph = fx.Graph()
    graph.output(graph.graph_copy(unit.stage.graph, {}))
    return fx.GraphModule(unit.stage, graph)


def called(stage: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return stage.get_submodule(str(node.target)) if node.op == "call_module" else None


def replace(
    stage: fx.GraphModule, node: fx.Node, module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    """Have a module compute what a node does; what only that needed stays, until `tidied`."""
    name = f"instead_of_{node.name}"
    stage.add_submodule(name, module)
    with stage.graph.inserting_before(node):
        node.replace_all_uses_with(stage.graph.call_module(name, inputs))
    stage.graph.erase_node(node)


def tidied(stage: fx.GraphModule) -> fx.GraphModule:
    """Without what nobody needs, ready to run."""
    stage.graph.eliminate_dead_code()
    stage.delete_all_unused_submodules()
    stage.recompile()
    return stage
