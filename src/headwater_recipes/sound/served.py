"""A run of a recipe about sounds, asked over HTTP as the Hugging Face API's audio classification."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from headwater.errors import BadInput
from headwater_recipes.common.serving import classes
from headwater_recipes.sound.decode import Unreadable, decode
from headwater_recipes.sound.features import MelSettings, log_mel
from headwater_recipes.sound.network import SoundNetwork, logits_of

MOST_BYTES = 32 * 2**20
"""Of a request: three minutes of stereo at 44.1 kHz and 16 bits."""


class AudioClassification:
    """Any sound that ``decode`` reads; of one longer than 30 s the beginning."""

    task = "audio-classification"

    def __init__(self, labels: tuple[str, ...], mel: MelSettings) -> None:
        self.labels, self.mel = labels, mel

    @classmethod
    def read(cls, folder: Path) -> tuple[nn.Module, Self]:
        """See ``Served.read``."""
        model = SoundNetwork.from_pretrained(folder).eval()
        return model, cls(model.settings.labels, model.settings.mel)

    def inputs(self, body: bytes, content_type: str) -> Tensor:
        """(T, M) log-mel. See ``Served.inputs``."""
        if not content_type.startswith(("audio/", "video/ogg", "application/octet-stream", "application/ogg")):
            raise BadInput(f"this model takes a sound (audio/wav, audio/ogg, audio/flac …), not {content_type}", 415)
        if len(body) > MOST_BYTES:
            raise BadInput(f"the sound has {len(body):,} bytes; {MOST_BYTES:,} are the most", 413)
        try:
            return log_mel(decode(body, self.mel.rate).samples, self.mel)
        except Unreadable as error:
            raise BadInput(f"{error}; nothing was answered") from None

    def answer(self, model: nn.Module, inputs: Tensor, parameters: Mapping[str, Any]) -> Any:
        """``[{"label", "score"}]``, likeliest first. See ``serving.classes``."""
        assert isinstance(model, SoundNetwork)
        return classes(logits_of(model, inputs), self.labels, parameters)
