"""The shape every backbone family has: a stem and stages of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

STEMS = (32, 224)


class Backbone(nn.Module):
    """A stem followed by stages; each stage is an ordered list of blocks.

    A family sets its own submodules (with the names its published weights use) and describes
    them once through `stages` and `stage_channels`. Nothing here is registered twice: `stages`
    returns references, so `state_dict()` holds only the family's own names.
    """

    stage_channels: tuple[int, ...]
    """Channels of the features that each stage hands on, shallow to deep."""

    classifier_prefixes: tuple[str, ...] = ("fc.", "classifier.")
    """State-dict names of the published classifier, which exits replace."""

    @property
    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """The blocks of each stage, shallow to deep."""
        raise NotImplementedError

    def drop_stages(self, kept: int) -> None:
        """Delete the blocks of every stage after the first `kept`; other names stay."""
        dropped = {id(block) for stage in self.stages[kept:] for block in stage}
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in dropped:
                    delattr(parent, name)

    def stem(self, x: Tensor) -> Tensor:
        """Normalised images `[N, 3, H, W]` to the first stage's input."""
        raise NotImplementedError

    def load_pretrained(self, state: Mapping[str, Tensor]) -> None:
        """Load a plain pretrained backbone, leaving its classifier out.

        Raises:
            RuntimeError: names or shapes differ from this backbone's.
        """
        kept = {k: v for k, v in state.items() if not k.startswith(self.classifier_prefixes)}
        self.load_state_dict(kept)
