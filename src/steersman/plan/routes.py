"""How weights travel between the phases of a layout."""

from __future__ import annotations

from steersman.plan.costs import HOST_BANDWIDTH, Verdict, moved_between_phases, waiting
from steersman.plan.devices import Cluster
from steersman.plan.layouts import Role, Work


def routes(verdict: Verdict, roles: list[Role], work: Work, there: Cluster) -> list[str]:
    """How weights travel between the phases, with the arithmetic: from where to where, bytes over what, seconds."""
    layout, actor, found = verdict.layout, roles[0].shape, []
    whole = actor.parameters * work.compute
    if "move weights" in verdict.seconds:
        through = there.count if layout.generators else layout.shards
        way = (
            f"from {layout.shards} pieces to each of {layout.generators} devices that sample"
            if layout.generators else f"put together on each device from {layout.shards} pieces, before sampling"
        )  # fmt: skip
        found.append(
            f"actor's weights {way}: {whole / 1e9:.2f} GB / {there.link(through) / 1e9:.0f} GB/s = "
            f"{verdict.seconds['move weights']:.2f} s"
        )
        if roles[0].adapter_parameters:
            found.append(
                f"with rollout.sync: adapter its adapters alone: {roles[0].adapter_parameters * 4 / 1e9:.3f} GB"
            )
    if come := waiting(layout, roles, work):
        found.append(
            f"reference and reward models from the node's memory: {sum(come) / 1e9:.1f} GB / "
            f"{HOST_BANDWIDTH / 1e9:.0f} GB/s = {sum(come) / HOST_BANDWIDTH:.2f} s"
        )
    if layout.offloaded:
        moved = moved_between_phases(roles, work)
        found.append(
            f"models to the node's memory and back: {moved / 1e9:.1f} GB / {layout.shards} devices / "
            f"{HOST_BANDWIDTH / 1e9:.0f} GB/s = {verdict.seconds['move models']:.2f} s"
        )
    return found or ["no weights move between phases: every device that samples holds what it trains"]
