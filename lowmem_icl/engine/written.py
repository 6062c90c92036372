"""What heads write into the residual at their mean outputs: function vectors.

Axis letters: F vectors, D width, Z the heads' outputs side by side.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem_icl.masks.mask import Mask
from lowmem_icl.masks.means import UnitMeans
from lowmem_icl.model.streamed import StreamedModel


def written_by_heads(model: StreamedModel, heads: Sequence[tuple[UnitMeans, Mask]]) -> NDArray[np.float32]:
    """Return what the heads of each mask write at the means beside it, summed over layers, [F, D].

    Only layers that have such heads are read.

    The output projection's bias is left out: it is written whatever heads do (Todd et al. 2024, section 2.3;
    their code adds it once per head).
    """
    skeleton = model.skeleton
    vectors = torch.zeros(len(heads), skeleton.width, device=model.device)
    width = skeleton.attention_width // skeleton.heads
    for number, layer in model.layers(sorted({number for _, mask in heads for number, _ in mask.heads})):
        whole = torch.from_numpy(np.stack([means.heads[number] for means, _ in heads])).to(model.device)
        part = torch.zeros_like(whole)
        for index, (_, mask) in enumerate(heads):
            for head in mask.heads_in(number):
                mine = slice(head * width, (head + 1) * width)
                part[index, mine] = whole[index, mine]
        with torch.no_grad():
            vectors += layer.written_by(part, whole)
    return np.asarray(vectors.cpu().numpy())
