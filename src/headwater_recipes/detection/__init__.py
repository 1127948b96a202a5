"""Where things are in an image, and what they are: `headwater train detection`."""
