"""The model: the network that all recipes about sounds share. A run's is read by its ``config.json``."""

from headwater_recipes.sound.network import NetworkSettings, SoundNetwork

__all__ = ["NetworkSettings", "SoundNetwork"]
