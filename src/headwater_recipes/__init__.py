"""Whole training jobs on Headwater. They import its public names only, as a user's script would."""
