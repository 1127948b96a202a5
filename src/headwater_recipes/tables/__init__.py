"""What recipes about tables of numbers share: reading, holding out, the run folder, serving."""
