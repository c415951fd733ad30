"""Independent tasks, computed here or by many processes: the same results either way.

    with workers.running(function, shared) as pool:
        for index, result in pool.map(tasks):
            ...

``workers`` is `InProcess` or `OnRay`; ``result`` is ``function(shared, tasks[index])``. And what is known of processes
that were started together: `processes`, `is_first`.
"""

from secateur.workers._launched import is_first, processes
from secateur.workers._ray import OnRay
from secateur.workers._workers import InProcess, Pool, Workers

__all__ = ["InProcess", "OnRay", "Pool", "Workers", "is_first", "processes"]
