"""From one language into another: `headwater train translation`."""
