"""Where the processes of a job run, and what starts them there."""
