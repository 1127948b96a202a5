"""``headwater train commands``: which word is spoken, learnt from a synthesizer's voices and judged on people too."""
