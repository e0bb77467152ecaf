"""Which saved loader state a rank goes on from, also when the number of ranks has changed."""

from __future__ import annotations

from typing import Any

from keye_data.errors import DataError

Layout = dict[str, Any]
State = dict[str, Any]


def pick(state: State | list[State], mine: Layout, version: int) -> State:
    """The state for the rank described by `mine`, out of its own or all ranks' saved states.

    Raises DataError saying what differs and what would be valid.
    """
    states = state if isinstance(state, list) else [state]
    if not states:
        raise DataError("the checkpoint holds no loader state; start a new run from its weights instead")
    for one in states:
        if one.get("version") != version:
            raise DataError(
                f"the checkpoint's loader state has version {one.get('version')}, this is version {version}"
            )
    layouts = [one["layout"] for one in states]
    for name in mine:
        if name not in ("rank", "world_size", "workers") and layouts[0].get(name) != mine[name]:
            raise DataError(
                f"the checkpoint's data had {name} {layouts[0].get(name)}, this run has {mine[name]}; they must agree to resume"
            )
    before = (layouts[0]["world_size"], layouts[0]["workers"])
    if before == (mine["world_size"], mine["workers"]):
        for one in states:
            if one["layout"]["rank"] == mine["rank"]:
                return one
        raise DataError(f"the checkpoint holds no loader state of data-parallel rank {mine['rank']}")
    _refuse_other_readers(before, mine)
    if len(states) != before[0]:
        raise DataError(
            f"resuming on another number of ranks needs the loader states of all {before[0]}, not {len(states)}"
        )
    return _redistribute(sorted(states, key=lambda one: one["layout"]["rank"]), mine)


def _refuse_other_readers(before: tuple[int, int], mine: Layout) -> None:
    """Energon's condition: data-parallel ranks x workers must stay the same; without workers nothing can move."""
    ranks, workers = before
    readers = ranks * workers
    if workers and mine["workers"] and readers == mine["world_size"] * mine["workers"]:
        return
    said = f"the checkpoint's data was read by {ranks} data-parallel ranks x {workers} workers"
    if workers and readers % mine["world_size"] == 0:
        raise DataError(
            f"{said}; on {mine['world_size']} ranks set data.workers={readers // mine['world_size']}, not {mine['workers']}"
        )
    if workers:
        raise DataError(
            f"{said}; resume on a number of ranks that divides {readers}, with data.workers such that the product is {readers}"
        )
    raise DataError(f"{said}; resume with {ranks} ranks and data.workers=0")


def _redistribute(states: list[State], mine: Layout) -> State:
    """All workers of all ranks in a line, cut anew. In plain form: ["SavableDataLoaderState", fields]."""
    workers: list[Any] = []
    for one in states:
        if one["energon"] is None:  # taken before the first batch
            workers += [None] * one["layout"]["workers"]
        else:
            workers += one["energon"][1]["worker_states"][1:]
    begin = mine["rank"] * mine["workers"]
    own = workers[begin : begin + mine["workers"]]
    if all(worker is None for worker in own):
        return {**states[0], "layout": mine, "energon": None}
    fields = {
        "worker_states": ["list", *own],
        "next_worker_id": 0,  # each rank starts with its first worker
        "micro_batch_size": mine["micro_batch_size"],
    }
    return {**states[0], "layout": mine, "energon": ["SavableDataLoaderState", fields]}
