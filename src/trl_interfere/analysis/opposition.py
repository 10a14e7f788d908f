"""How far an update opposes, on each route, what the earlier domain's own training had done."""

import numpy as np
from transformers import PreTrainedModel

from .attribution import Direction, Elementwise, dot
from .routes import RouteMap


def opposed_edits(
    route_map: RouteMap, base: PreTrainedModel, start: Direction, delta: Direction
) -> dict[str, np.ndarray]:
    """
    `opposed`, the length of the update against the earlier domain's own training, and `earlier_edit_size`.

    ```
    opposed_r = max(0, -<δ_A,r , δ_r> / |δ_A,r|)        δ_A = before - base
    ```
    """
    parameters = dict(base.named_parameters())

    def edit(name: str):
        like = delta[name]
        return start[name].to(like.device) - parameters[name].detach().to(like)

    earlier = Elementwise(start, edit)
    size = np.sqrt(dot(route_map, earlier, earlier).routes)
    inner = dot(route_map, earlier, delta).routes
    opposed = np.divide(-inner, size, out=np.zeros_like(inner), where=size > 0).clip(min=0)
    return {"opposed": opposed, "earlier_edit_size": size}
