"""Room for gradients on accelerators."""

import torch
from transformers import PreTrainedModel


# Of what a pass takes beside the weights: passes over longer sequences come later, and memory is in fragments.
_MARGIN = 1.25


class Room:
    """
    Whether the devices of a model can keep the gradient of a pass while the next one is computed.

    Made before the pass, and asked after it: the pass itself has shown what the next one takes. What was allocated at
    the peak of the whole process counts as taken by it, so that the answer errs toward no.
    """

    def __init__(self, model: PreTrainedModel):
        devices = {parameter.device for parameter in model.parameters()}
        self._known = all(device.type in ("cpu", "cuda") for device in devices)
        self._held = {device: torch.cuda.memory_allocated(device) for device in devices if device.type == "cuda"}

    def for_another(self) -> bool:
        """Whether there is room."""
        return self._known and all(self._fits(device, held) for device, held in self._held.items())

    def _fits(self, device: torch.device, held: int) -> bool:
        taken = torch.cuda.max_memory_allocated(device) - held
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused >= _MARGIN * taken
