"""Speech from text by eSpeak NG, whose library is called in this process (``espeak-ng/speak_lib.h``)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headwater.errors import DataError

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, and no device is opened
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Manner(NamedTuple):
    """How something is said: ``voice`` is an accent with a variant, as ``en-us+f2``; ``speed`` in words per minute (80
    to 450); ``pitch`` and ``range`` of it from 0 to 99.
    """

    voice: str
    speed: int
    pitch: int
    range: int


class Espeak:
    """The library keeps one state for the process: use one object at a time.

    Args:
        folder: the data set ``espeak``: ``libespeak-ng.so`` and ``espeak-ng-data/``.

    Raises:
        DataError: it cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        except OSError as error:
            raise DataError(f"{folder}: eSpeak NG cannot be loaded ({error}); nothing was started") from error
        self.rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(folder).encode(), 0)
        """Samples per second of what it says."""
        if self.rate <= 0:
            raise DataError(f"{folder}: eSpeak NG cannot begin with its data (code {self.rate}); nothing was started")
        self._said: list[npt.NDArray[np.int16]] = []
        self._callback = _CALLBACK(self._take)  # kept: the library holds no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: int | None) -> int:
        del events
        if samples and count > 0:
            self._said.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, manner: Manner) -> npt.NDArray[np.float32]:
        """float32 (N,) at ``rate``, from -1 to 1.

        Raises:
            DataError: there is no such voice, or the library fails.
        """
        if self._library.espeak_SetVoiceByName(manner.voice.encode()):
            raise DataError(f"eSpeak NG has no voice {manner.voice!r}")
        for number, value in ((_RATE, manner.speed), (_PITCH, manner.pitch), (_RANGE, manner.range)):
            self._library.espeak_SetParameter(number, value, 0)
        self._said.clear()
        body = text.encode()
        failed = self._library.espeak_Synth(body, ctypes.c_size_t(len(body) + 1), 0, 0, 0, _UTF8, None, None)
        if failed or self._library.espeak_Synchronize() or not self._said:
            raise DataError(f"eSpeak NG did not say {text!r} with the voice {manner.voice!r} (code {failed})")
        return np.concatenate(self._said).astype(np.float32) / np.float32(32768)
